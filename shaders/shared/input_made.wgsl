// What a matvec of one token multiplies, made by each workgroup of what the last launches have left: the columns of its split, a
// quad of them a lane, as digits and scales in workgroup memory. In the place of input.wgsl, with quantized.wgsl beside it. The
// importer provides  fn made4(lane, quad) -> vec4<f32>, which all lanes call; 0 past the end;  lanes are no fewer than the quads of
// a split.

override split_blocks: u32;  // most blocks of a split
override digit_groups: u32 = 2u * split_blocks;  // of 16 columns
override input_groups: u32 = digits * digit_groups;

const INPUT_OF_SPLIT = true;

var<workgroup> in_digits: array<vec4<u32>, input_groups>;  // (digits, 16-column groups)
var<workgroup> in_scale: array<vec2<f32>, split_blocks>;
var<private> begin_block: u32;  // of the split

fn input_blocks() -> u32 { return split_blocks; }
fn input_block(block: u32) -> u32 { return block - begin_block; }
fn block_scale(i: u32) -> vec2<f32> { return in_scale[i]; }

// The lane's quad, and in workgroup memory how large it is: what it is made of is loaded before anything that has to be waited
// for. A barrier later `end_input` may be called, by all lanes.
fn begin_input(split: u32, lane: u32) -> vec4<f32> {
  begin_block = first_block(split * segments_per_group);
  let v = made4(lane, 8u * begin_block + lane);
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
