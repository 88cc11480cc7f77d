// How the next token is drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave everything in.

struct Sampling {
  temperature: f32,
  top_k: u32,
  top_p: f32,
  min_p: f32,
}
