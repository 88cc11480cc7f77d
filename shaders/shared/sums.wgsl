// What a lane of a matvec adds up for a row: one sum for each token of the pass.

override tokens: u32;  // 1..MOST_SUMS

const MOST_SUMS = 16u;

alias Sums = array<f32, MOST_SUMS>;
