// Shifts of words to the left; of `shift` the low five bits count, and bit 5 is 0. Where there are 64-bit integers,
// funnel_wide.wgsl takes the place of this file: its compilers make one instruction of each.

fn leading(word: u32, shift: u32) -> u32 {  // what a shift by 1..31 moves out
  return word >> ((0u - shift) & 31u);
}

fn funnel(high: u32, low: u32, shift: u32) -> u32 {  // the high word of both, shifted by 0..31
  return (high << (shift & 31u)) | ((low >> 1u) >> (~shift & 31u));
}
