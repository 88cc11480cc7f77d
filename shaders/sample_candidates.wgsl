// The best token of each part of the vocabulary: greedy the largest logit, otherwise the largest of
// logit / temperature + Gumbel noise above the threshold, which draws from the softmax exactly and needs no sum
// (Gumbel 1954; Maddison et al. 2014). The noise is a hash of (seed, position, token): the same seed, the same text.
// rows == 1: the logits are those after the pass's last token, otherwise row i has those after its i-th. All rows are drawn
// alike, or each in its own way, as there are settings.
// A lane looks at every (workgroups * lanes)-th token. Dispatch: (n_candidates, rows).

//#import state
//#import rows
//#import sampling
//#import settings

override lanes: u32;
override rows: u32;

struct Params {
  vocab_size: u32,
  n_candidates: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> sampling: array<Sampling>;  // (1) or (rows)
@group(0) @binding(3) var<storage, read> logits: array<f32>;     // (rows, vocab_size)
@group(0) @binding(4) var<storage, read> threshold: array<f32>;  // (rows)
@group(0) @binding(5) var<storage, read_write> candidates: array<Candidate>;  // (rows, n_candidates)
@group(0) @binding(6) var<storage, read> pass_rows: array<PassRow>;  // (rows), if batched

var<workgroup> best: array<Candidate, lanes>;

fn pcg(value: u32) -> u32 {  // Jarzynski & Olano 2020, "Hash Functions for GPU Rendering": pcg
  let state = value * 747796405u + 2891336453u;
  let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
  return (word >> 22u) ^ word;
}

fn gumbel(token: u32, row: u32) -> f32 {
  let pos = row_position(select(row, state.n_tokens - 1u, rows == 1u)) + 1u;
  let hash = pcg(token ^ pcg(pos ^ pcg(row_seed(row))));
  let uniform_ = (f32(hash >> 9u) + 0.5) * exp2(-23.0);  // 23 bits: neither 0 nor 1 after rounding
  return -log(-log(uniform_));
}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let row = group.y;
  let temperature = settings(row).temperature;
  var mine = Candidate(-3.4e38, 0xFFFFFFFFu);
  for (var token = group.x * lanes + lane; token < params.vocab_size; token += params.n_candidates * lanes) {
    var score = logits[row * params.vocab_size + token];
    if (temperature > 0.0) {
      score = select(-3.4e38, score / temperature + gumbel(token, row), score >= threshold[row]);
    }
    if (score > mine.score) { mine = Candidate(score, token); }
  }
  best[lane] = mine;
  workgroupBarrier();
  for (var stride = lanes / 2u; stride > 0u; stride >>= 1u) {
    if (lane < stride) { best[lane] = better(best[lane], best[lane + stride]); }
    workgroupBarrier();
  }
  if (lane == 0u) { candidates[row * params.n_candidates + group.x] = best[0]; }
}
