// What was drawn after each row becomes that row's next input, one position further: sample_token for rows of several
// sequences. One workgroup = one row. Dispatch: rows; those past the pass's last have nothing to say.

//#import state
//#import rows
//#import sampling
//#import best

struct Params {
  n_candidates: u32,
  rows: u32,  // that there is room for
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> candidates: array<Candidate>;  // (rows, n_candidates)
@group(0) @binding(2) var<storage, read_write> state: State;
@group(0) @binding(3) var<storage, read_write> pass_rows: array<PassRow>;
@group(0) @binding(4) var<storage, read_write> sampled: array<u32>;  // a ring, by n_drawn, of (rows)

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let row = group.x;
  let token = best_token(lane, row);
  if (lane == 0u && row < state.n_tokens) {
    sampled[(pass_rows[row].n_drawn * params.rows + row) % arrayLength(&sampled)] = token;
    state.tokens[row] = token;
    pass_rows[row].pos += 1u;
    pass_rows[row].n_drawn += 1u;
  }
}
