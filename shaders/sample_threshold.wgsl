// The least logit that may be drawn: the largest of the bounds that min_p, top_k and then top_p (over what top_k left)
// set. No sort: a bound is found digit by digit, four bits of the float's ordered bits at a time, counting or adding up
// what lies above each of the 15 candidates. Logits equal to the bound all stay in.
// One workgroup = one row. Dispatch: rows. Probabilities in f32.

//#import sampling
//#import settings

override lanes: u32;

struct Params { vocab_size: u32 }

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> sampling: array<Sampling>;  // (1) or (rows)
@group(0) @binding(2) var<storage, read> logits: array<f32>;  // (rows, vocab_size)
@group(0) @binding(3) var<storage, read_write> threshold: array<f32>;  // (rows)

alias Totals = array<f32, 16>;

var<workgroup> lane_max: array<f32, lanes>;
var<workgroup> lane_totals: array<Totals, lanes>;

fn ordered(value: f32) -> u32 {  // u32 order = f32 order
  let bits = bitcast<u32>(value);
  return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

fn from_ordered(key: u32) -> f32 {
  return bitcast<f32>(select(~key, key & 0x7FFFFFFFu, (key & 0x80000000u) != 0u));
}

// The largest key such that the logits at or above it number (or weigh, as a share) at least `wanted`; `floor_key`
// is where the search's population ends.
fn search(lane: u32, row: u32, largest: f32, floor_key: u32, weigh: bool, wanted: f32, temperature: f32) -> u32 {
  var key = 0u;
  var goal = wanted;
  for (var shift = 32u; shift > 0u; ) {
    shift -= 4u;
    var totals = Totals();  // [d]: at or above key + (d << shift); spelled out, or naga zeroes it in the first round only
    for (var i = lane; i < params.vocab_size; i += lanes) {
      let logit = logits[row * params.vocab_size + i];
      let its_key = ordered(logit);
      if (its_key >= floor_key && its_key >= key) {
        var amount = 1.0;
        if (weigh) { amount = exp((logit - largest) / temperature); }
        let above = (its_key - key) >> shift;
        for (var d = 0u; d < 16u; d++) { totals[d] += select(0.0, amount, above >= d); }
      }
    }
    lane_totals[lane] = totals;
    workgroupBarrier();
    for (var stride = lanes / 2u; stride > 0u; stride >>= 1u) {
      if (lane < stride) {
        for (var d = 0u; d < 16u; d++) { lane_totals[lane][d] += lane_totals[lane + stride][d]; }
      }
      workgroupBarrier();
    }
    if (weigh && shift == 28u) { goal = wanted * lane_totals[0][0]; }
    var digit = 0u;
    for (var d = 1u; d < 16u; d++) { digit = select(digit, d, lane_totals[0][d] >= goal); }
    key += digit << shift;
    workgroupBarrier();
  }
  return key;
}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let row = group.x;
  let drawn = settings(row);
  if (drawn.temperature == 0.0) { return; }
  let begin = row * params.vocab_size;
  var largest = logits[begin];
  for (var i = lane; i < params.vocab_size; i += lanes) { largest = max(largest, logits[begin + i]); }
  lane_max[lane] = largest;
  workgroupBarrier();
  for (var stride = lanes / 2u; stride > 0u; stride >>= 1u) {
    if (lane < stride) { lane_max[lane] = max(lane_max[lane], lane_max[lane + stride]); }
    workgroupBarrier();
  }
  largest = lane_max[0];
  var key = 0u;
  if (drawn.top_k > 0u && drawn.top_k < params.vocab_size) {
    key = search(lane, row, largest, 0u, false, f32(drawn.top_k), drawn.temperature);
  }
  if (drawn.top_p < 1.0) { key = max(key, search(lane, row, largest, key, true, drawn.top_p, drawn.temperature)); }
  var bound = select(from_ordered(key), -3.4e38, key == 0u);
  if (drawn.min_p > 0.0) { bound = max(bound, largest + drawn.temperature * log(drawn.min_p)); }
  if (lane == 0u) { threshold[row] = min(bound, largest); }
}
