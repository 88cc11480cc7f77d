// Shifts of two words. Where there are 64-bit integers, funnel_wide.wgsl takes the place of this file: its compilers make one
// instruction of each.

fn funnel(high: u32, low: u32, shift: u32) -> u32 {  // the high word of both, shifted to the left by 0..31
  return (high << shift) | ((low >> 1u) >> (31u - shift));
}

fn funnel_right(high: u32, low: u32, shift: u32) -> u32 {  // the low word, shifted to the right by 1..31
  return (high << (32u - shift)) | (low >> shift);
}
