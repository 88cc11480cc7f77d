// The decode tables of all classes where they lie, for lanes that each have a row to themselves. The importer provides
// table: array<vec4<u32>, 4096>, uniform.

fn table_entry(s: ptr<function, Stream>) -> u32 {
  let i = (*s).table + (*s).state;
  return table[i >> 2u][i & 3u];
}
