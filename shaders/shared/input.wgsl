// What a matvec multiplies, in memory: in_digits and in_scale have all columns. In its place input_made.wgsl makes them.

const INPUT_OF_SPLIT = false;

fn input_blocks() -> u32 { return params.n_blocks; }
fn input_block(block: u32) -> u32 { return block; }
