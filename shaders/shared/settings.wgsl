// How each row of a pass is drawn. The importer provides  sampling: array<Sampling>: one for all rows, or one each.

fn settings(row: u32) -> Sampling { return sampling[min(row, arrayLength(&sampling) - 1u)]; }
