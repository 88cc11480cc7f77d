// What a lane of a matvec adds up: one sum for each token of the pass, for each of its rows.

override tokens: u32;         // 1..MAX_TOKENS
override rows_per_lane: u32;  // 1..MAX_ROWS: the activations are loaded once for all of them

const MAX_ROWS = 4u;

alias Sums = array<f32, MAX_TOKENS>;
