// table.wgsl with every state twice: even lanes look into one copy and odd lanes into the other, each in half of the banks,
// so that fewer lanes meet in a bank.

var<workgroup> states: array<vec2<u32>, n_states>;
var<private> copy: u32;  // the lane's

fn table_entry(s: ptr<function, Stream>) -> u32 { return states[(*s).state][copy]; }

fn load_table(lane: u32, n_lanes: u32, first: u32) {
  copy = lane % 2u;
  for (var i = lane; i < n_states; i += n_lanes) {
    states[i] = vec2<u32>(table[(first + i) / 4u][i % 4u]);
  }
  workgroupBarrier();
}
