// How the next token is drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave everything in.

struct Sampling {
  temperature: f32,
  top_k: u32,
  top_p: f32,
  min_p: f32,
}

struct Candidate {
  score: f32,
  token: u32,
}

fn better(a: Candidate, b: Candidate) -> Candidate {  // ties go to the lower token, as numpy's argmax has it
  if (b.score > a.score || (b.score == a.score && b.token < a.token)) { return b; }
  return a;
}
