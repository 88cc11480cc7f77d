// The best of the candidates becomes the next pass's token, and the state moves past what this pass has read.
// Ties go to the lower token, as numpy's argmax has it. One workgroup. Dispatch: 1.

//#import state

override lanes: u32;

struct Params { n_candidates: u32 }

struct Candidate { score: f32, token: u32 }

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> candidates: array<Candidate>;
@group(0) @binding(2) var<storage, read_write> state: State;
@group(0) @binding(3) var<storage, read_write> sampled: array<u32>;  // a ring, by n_sampled

var<workgroup> best: array<Candidate, lanes>;

fn better(a: Candidate, b: Candidate) -> Candidate {
  if (b.score > a.score || (b.score == a.score && b.token < a.token)) { return b; }
  return a;
}

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
