// One class's decode table in workgroup memory, for lanes whose rows are of one tile. In its place table_twice.wgsl has it
// twice. The importer provides  table: array<vec4<u32>>.

var<workgroup> states: array<u32, n_states>;

fn table_entry(s: ptr<function, Stream>) -> u32 { return states[(*s).state]; }

// The table whose first entry this is; to be called by all n_lanes of the workgroup.
fn load_table(lane: u32, n_lanes: u32, first: u32) {
  for (var i = lane; i < n_states / 4u; i += n_lanes) {
    let four = table[first / 4u + i];
    states[4u * i] = four.x;
    states[4u * i + 1u] = four.y;
    states[4u * i + 2u] = four.z;
    states[4u * i + 3u] = four.w;
  }
  workgroupBarrier();
}
