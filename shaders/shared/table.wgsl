// One class's decode table in workgroup memory, for lanes whose rows are of one tile. Where there is room it stands there
// twice, state by state: even lanes look into one copy and odd lanes into the other, each in half of the banks, so that
// fewer lanes meet in a bank. The importer provides table: array<vec4<u32>>.

override copies: u32;       // 1 or 2
override table_words: u32;  // copies * n_states

var<workgroup> states: array<u32, table_words>;
var<private> copy: u32;  // the lane's

fn table_entry(s: ptr<function, Stream>) -> u32 { return states[(*s).state * copies + copy]; }

// The table whose first entry this is; to be called by all n_lanes of the workgroup.
fn load_table(lane: u32, n_lanes: u32, first: u32) {
  copy = lane % copies;
  for (var i = lane; i < n_states; i += n_lanes) {
    let entry = table[(first + i) / 4u][i % 4u];
    for (var k = 0u; k < copies; k++) { states[i * copies + k] = entry; }
  }
  workgroupBarrier();
}
