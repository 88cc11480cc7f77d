// The best of the candidates becomes the next pass's token, and the state moves past what this pass has read.
// One workgroup. Dispatch: 1.

//#import state
//#import sampling

override lanes: u32;

struct Params { n_candidates: u32 }

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> candidates: array<Candidate>;
@group(0) @binding(2) var<storage, read_write> state: State;
@group(0) @binding(3) var<storage, read_write> sampled: array<u32>;  // a ring, by n_sampled

var<workgroup> best: array<Candidate, lanes>;

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32) {
  var mine = Candidate(-3.4e38, 0xFFFFFFFFu);
  for (var i = lane; i < params.n_candidates; i += lanes) { mine = better(mine, candidates[i]); }
  best[lane] = mine;
  workgroupBarrier();
  for (var stride = lanes / 2u; stride > 0u; stride >>= 1u) {
    if (lane < stride) { best[lane] = better(best[lane], best[lane + stride]); }
    workgroupBarrier();
  }
  if (lane == 0u) {
    let token = best[0].token;
    sampled[state.n_sampled % arrayLength(&sampled)] = token;
    state.n_sampled += 1u;
    state.pos += state.n_tokens;
    state.n_tokens = 1u;
    state.tokens[0] = token;
  }
}
