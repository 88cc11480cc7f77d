// Decoded weights as bytes, for products with many tokens: weight = sum over planes of byte << plane_shift(plane).
// With up to 2 raw bits a weight is one signed byte; with more its high part is one and its raw bits are another.
// An outlier is near if its byte has room for it whatever symbol it stands at: it is put there. Far ones are left to the
// product. Beside it stand the override raw_bits and matrix.wgsl.

override planes: u32;  // 1 or 2

fn plane_shift(plane: u32) -> u32 { return select(0u, raw_bits, planes == 2u && plane == 0u); }

fn symbol_shift(raw: u32) -> u32 { return raw - plane_shift(0u); }  // of symbols, within the first plane
