// Where a sequence's positions lie in the cache: one sequence alone has it all, in order; with `paged` it has blocks of
// BLOCK positions, wherever one was free. The importer provides  blocks: array<u32>  (tables, blocks_per_table): one table
// for every row of a pass, or a single one,  and  params.blocks_per_table.

override paged: bool;

const BLOCK = 16u;

fn cache_position(table: u32, pos: u32) -> u32 {
  if (!paged) { return pos; }
  return blocks[table * params.blocks_per_table + pos / BLOCK] * BLOCK + pos % BLOCK;
}
