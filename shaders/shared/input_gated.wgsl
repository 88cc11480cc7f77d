// What a matvec of one token multiplies, made by each workgroup of gate and up, of the columns of its split: h = silu(gate) * up
// as the digits and scales that swiglu.wgsl would leave in memory, a quad of columns a lane. It stands in the place of
// input.wgsl, with quantize.wgsl and gated.wgsl beside it. The importer provides  gate_up: array<vec4<f32>>  (gate_splits,
// 2 cols / 4),  params.cols, a multiple of 4,  and  lanes, no fewer than a split has quads.

override gate_splits: u32;   // of gate_up: known beforehand, so that all its loads are under way together
override split_blocks: u32;  // most blocks of a split
override digit_groups: u32 = 2u * split_blocks;  // of 16 columns
override input_groups: u32 = digits * digit_groups;

const INPUT_OF_SPLIT = true;

var<workgroup> in_digits: array<vec4<u32>, input_groups>;  // (digits, 16-column groups)
var<workgroup> in_scale: array<vec2<f32>, split_blocks>;
var<private> begin_block: u32;  // of the split

fn input_blocks() -> u32 { return split_blocks; }
fn input_block(block: u32) -> u32 { return block - begin_block; }

// What the lane adds, and in workgroup memory how large it is. To be called early, as gate and up come from far away: nothing
// else has to be there. A barrier later `end_input` may be called, by all lanes.
fn begin_input(split: u32, lane: u32) -> vec4<f32> {
  begin_block = first_block(split * segments_per_group);
  let quad = 8u * begin_block + lane;
  let quads = params.cols / 4u;
  var gate = vec4<f32>(0.0);
  var up = vec4<f32>(0.0);
  if (lane < 8u * split_blocks) {
    for (var i = 0u; i < gate_splits; i++) {
      let at = 2u * i * quads + min(quad, quads - 1u);
      gate += gate_up[at];
      up += gate_up[at + quads];
    }
  }
  let v = select(vec4<f32>(0.0), silu(gate) * up, quad < quads);
  share_size(v, lane);
  return v;
}

fn end_input(v: vec4<f32>, lane: u32) {
  let q = quantized(v, lane);
  let used = lane < 8u * split_blocks;
  for (var digit = 0u; digit < digits; digit++) {
    if (used) { in_digits[digit * digit_groups + lane / 4u][lane % 4u] = q.words[digit]; }
  }
  workgroupBarrier();
  if (used && lane % 8u == 0u) { in_scale[lane / 8u] = vec2<f32>(q.scale, q.scale * block_total(lane)); }
  workgroupBarrier();
}
