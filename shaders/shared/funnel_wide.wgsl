// funnel.wgsl by 64-bit integers.

fn both(high: u32, low: u32) -> u64 { return (u64(high) << 32u) | u64(low); }

fn funnel(high: u32, low: u32, shift: u32) -> u32 { return u32((both(high, low) << shift) >> 32u); }

fn funnel_right(high: u32, low: u32, shift: u32) -> u32 { return u32(both(high, low) >> shift); }
