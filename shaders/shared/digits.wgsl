// Activations are int8 digits: x = scale (d0 + d1 / 254 + d2 / 254^2), one scale for 32 columns. One digit is the int8
// mode; three carry 23 bits below the block's largest value, no less than f32 rounding leaves of a sum, and are the exact
// mode. For weights without loss they are f32.

override digits: u32;  // 1 or 3; or FLOAT

const FLOAT = 4u;  // bytes a column, as a digit is one
