// The rows of a pass: the tokens of one sequence side by side, or with `batched` of several sequences, each row with a
// place of its own; its token is in the state. The importer provides  state: State,  pass_rows: array<PassRow>.

override batched: bool;

struct PassRow {
  pos: u32,      // of the row's token in its sequence
  seed: u32,
  first: u32,    // the first row of the same sequence: they lie side by side, in order
  n_drawn: u32,  // tokens drawn since the host last wrote this
}

fn row_position(row: u32) -> u32 {
  if (batched) { return pass_rows[row].pos; }
  return state.pos + row;
}

fn row_seed(row: u32) -> u32 {
  if (batched) { return pass_rows[row].seed; }
  return state.seed;
}

fn first_of_sequence(row: u32) -> u32 {
  if (batched) { return pass_rows[row].first; }
  return 0u;
}
