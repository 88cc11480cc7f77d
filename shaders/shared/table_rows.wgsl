// The decode tables of all classes where they lie, for lanes that each have a row to themselves. The importer provides
// table: array<vec4<u32>, 4096>, uniform.

fn entry_at(i: u32) -> u32 { return table[i >> 2u][i & 3u]; }

fn table_entry(s: ptr<function, Stream>) -> u32 { return entry_at((*s).table + (*s).state); }
