// What changes from step to step. The host writes it before a prompt chunk; sample_token advances it on the GPU.

const MAX_TOKENS = 8u;  // tokens that one pass of a matvec may carry

struct State {
  pos: u32,       // position of tokens[0] in the sequence
  n_tokens: u32,  // of the pass, at least 1; what the pass computes beyond them is never read
  n_sampled: u32, // tokens sampled since the host last wrote this
  seed: u32,
  tokens: array<u32>,
}
