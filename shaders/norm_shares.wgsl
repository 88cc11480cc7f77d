// rms_norm of one token by as many workgroups as have a quad for each lane: x += sum over splits of y, weight * x as digits, and of
// x^2 each block's sum, of which the matvec that reads the digits makes the factor that they lack (input_squares.wgsl). Nobody
// waits for another workgroup so. dim is a multiple of 4, digits are padded with zeros to whole blocks. Dispatch: (quads / lanes).

//#import digits
//#import quantized
//#import quantize
//#import quantize_normed

override splits: u32;  // of y; 0: nothing to add
override dim: u32;

@group(0) @binding(0) var<storage, read> y: array<vec4<f32>>;  // (splits, dim / 4)
@group(0) @binding(1) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> x_digits: array<u32>;  // (digits, 4-column groups)
@group(0) @binding(4) var<storage, read_write> x_scale: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> squares: array<f32>;  // (blocks,)

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let quad = group.x * lanes + lane;
  let quads = dim / 4u;
  let n_blocks = (dim + 31u) / 32u;
  var v = vec4<f32>(0.0);
  var normed = vec4<f32>(0.0);
  if (quad < quads) {
    v = x[quad];
    for (var split = 0u; split < splits; split++) { v += y[split * quads + quad]; }
    normed = v * weight[quad];
    x[quad] = v;
  }
  let sum = quantize_normed(normed, dot(v, v), lane, quad, n_blocks);
  if (quad < 8u * n_blocks && lane % 8u == 0u) { squares[quad / 8u] = sum; }
}
