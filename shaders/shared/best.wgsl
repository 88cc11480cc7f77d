// The best of a row's candidates. Beside it stands sampling.wgsl; the importer provides
// candidates: array<Candidate>  (rows, n_candidates)  and  params.n_candidates.

override lanes: u32;

var<workgroup> best: array<Candidate, lanes>;

// Its token, for lane 0; to be called by all lanes, and a barrier before it is called again.
fn best_token(lane: u32, row: u32) -> u32 {
  var mine = Candidate(-3.4e38, 0xFFFFFFFFu);
  for (var i = lane; i < params.n_candidates; i += lanes) {
    mine = better(mine, candidates[row * params.n_candidates + i]);
  }
  best[lane] = mine;
  workgroupBarrier();
  for (var stride = lanes / 2u; stride > 0u; stride >>= 1u) {
    if (lane < stride) { best[lane] = better(best[lane], best[lane + stride]); }
    workgroupBarrier();
  }
  return best[0].token;
}
