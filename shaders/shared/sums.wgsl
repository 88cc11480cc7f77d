// What a lane of a matvec adds up for a row: one sum for each token of the pass.

override tokens: u32;  // 1..MAX_TOKENS

alias Sums = array<f32, MAX_TOKENS>;
