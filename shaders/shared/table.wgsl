// One class's decode table in workgroup memory, for lanes whose rows are of one tile. Where there is room every state stands
// there twice: even lanes look into one copy and odd lanes into the other, each in half of the banks, so that fewer lanes
// meet in a bank. The importer provides table: array<vec4<u32>>.

override copies: u32;       // 1 or 2
override table_pairs: u32;  // copies * n_states / 2

var<workgroup> states: array<vec2<u32>, table_pairs>;
var<private> copy: u32;  // the lane's

fn table_entry(s: ptr<function, Stream>) -> u32 {
  if (copies == 2u) { return states[(*s).state][copy]; }
  return states[(*s).state / 2u][(*s).state % 2u];
}

// The table whose first entry this is; to be called by all n_lanes of the workgroup.
fn load_table(lane: u32, n_lanes: u32, first: u32) {
  copy = lane % 2u;
  for (var i = lane; i < table_pairs; i += n_lanes) {
    if (copies == 2u) {
      states[i] = vec2<u32>(table[(first + i) / 4u][i % 4u]);
    } else {
      let four = table[(first + 2u * i) / 4u];
      states[i] = select(four.xy, four.zw, i % 2u == 1u);
    }
  }
  workgroupBarrier();
}
