// What was drawn becomes the next pass's input, and the state moves past what this pass has read.
// rows == 1: one token, drawn after the pass's last. Otherwise row i was drawn after tokens[i], and all tokens but the
// first are guesses: one counts while it is what was drawn before it, so that the text is that of single passes,
// whatever was guessed (Leviathan et al. 2023, with a draft that puts all its weight on one token).
// One workgroup. Dispatch: 1.

//#import state
//#import sampling
//#import best

override rows: u32;

struct Params { n_candidates: u32 }

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> candidates: array<Candidate>;  // (rows, n_candidates)
@group(0) @binding(2) var<storage, read_write> state: State;
@group(0) @binding(3) var<storage, read_write> sampled: array<u32>;  // a ring, by n_sampled

var<workgroup> drawn: array<u32, MAX_TOKENS>;

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32) {
  for (var row = 0u; row < rows; row++) {
    let token = best_token(lane, row);
    if (lane == 0u) { drawn[row] = token; }
    workgroupBarrier();
  }
  if (lane == 0u) {
    var n = 1u;
    while (n < min(rows, state.n_tokens) && state.tokens[n] == drawn[n - 1u]) { n++; }
    for (var i = 0u; i < n; i++) { sampled[(state.n_sampled + i) % arrayLength(&sampled)] = drawn[i]; }
    state.n_sampled += n;
    state.pos += select(n, state.n_tokens, rows == 1u);
    state.n_tokens = 1u;
    state.tokens[0] = drawn[n - 1u];
  }
}
