// What one workgroup is to do when all others of the dispatch are done, without a dispatch of its own. What it then reads
// of theirs must have been stored, and be loaded, by atomics: other loads may find what a nearer cache held before. Only
// for adapters on which a storageBarrier orders what the whole device sees (Vulkan's do; Metal's need not).
// The importer provides  arrived: array<atomic<u32>>, zeros, and they are left as zeros.

var<workgroup> is_last: u32;

// Whether this workgroup is the last of n to come here with this `slot`; to be called by all its lanes.
fn last_to_arrive(lane: u32, slot: u32, n: u32) -> bool {
  storageBarrier();
  workgroupBarrier();
  if (lane == 0u) {
    is_last = u32(atomicAdd(&arrived[slot], 1u) == n - 1u);
    if (is_last == 1u) { atomicStore(&arrived[slot], 0u); }
  }
  let last = workgroupUniformLoad(&is_last) == 1u;
  storageBarrier();
  return last;
}
