// Decoded weights as bytes, for products with many tokens: weight = sum over planes of byte << plane_shift(plane).
// With up to 2 raw bits a weight is one signed byte; with more its high part is one and its raw bits are another.
// An outlier goes into its byte where that has room for it whatever symbol it stands at, or else stays a far one, which
// the product adds. Beside it stands matrix.wgsl; the importer provides  params.min_symbol, params.max_symbol: i32  and
// the override raw_bits.

override planes: u32;  // 1 or 2

fn plane_shift(plane: u32) -> u32 { return select(0u, raw_bits, planes == 2u && plane == 0u); }

fn symbol_shift() -> u32 { return raw_bits - plane_shift(0u); }  // of symbols, within the first plane

fn remainder(outlier: u32) -> i32 { return bitcast<i32>(outlier) >> 16u; }

fn is_far(outlier: u32) -> bool {
  let room = 128 >> symbol_shift();
  return params.min_symbol + remainder(outlier) < -room || params.max_symbol + remainder(outlier) >= room;
}
