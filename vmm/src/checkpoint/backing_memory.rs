//! Guest memory from the files of a save: mapped, copied, or read while the guest runs.
use std::{io, os::unix::fs::FileExt};

use config::{MemoryConfig, incoming::Mapping};
use machine::{
    Report,
    memory::{
        self, MemoryError, image as ram,
        origin::{Contents, Origin},
    },
};
use state::{
    backing_chain::{BackingChain, Piece},
    directory::DirectoryError,
    memory_file::BLOCK,
};

use super::{LoadError, demand_paging};
use crate::seccomp::Confinement;

/// Most changed ranges that are mapped, each of which takes one mapping of the process; the
/// smallest ranges beyond this number are copied. A process may have 65,530 mappings
/// (vm.max_map_count).
const MAPPINGS: usize = 16 << 10;

/// Guest memory with the contents of `chain`, and which ranges of it may not be zero although the
/// guest has not touched them. It is mapped, which takes no time and trusts the files; or read on
/// first access, by threads that are confined by `confinement` and report damage to `report`; or
/// copied, which is the only way for memory that is shared or has a file of its own.
///
/// # Errors
/// When there is not enough memory, or a file is damaged.
pub fn memory(
    chain: BackingChain,
    config: &MemoryConfig,
    mapping: Mapping,
    report: &Report,
    confinement: &Confinement,
) -> Result<Contents, LoadError> {
    let own = !config.shared && config.path.is_none();
    match mapping {
        Mapping::On if own => return Ok(map(&chain, config)?),
        Mapping::Uffd if own => {
            let contents = chain.open().map_err(DirectoryError::from)?;
            contents.check_zeros().map_err(DirectoryError::from)?;
            return Ok(demand_paging::start(contents, config, report.clone(), confinement)?);
        }
        _ => {}
    }
    let memory = memory::allocate(config)?;
    let copy = |at, bytes: &[u8]| ram::write(&memory, at, bytes);
    chain.open().map_err(DirectoryError::from)?.verify(copy).map_err(DirectoryError::from)?;
    Ok(memory.into())
}

/// Guest memory mapped from the files of `chain`, and which ranges of it may not be zero although
/// the guest has not touched them.
///
/// # Errors
/// When the host cannot map them.
fn map(chain: &BackingChain, config: &MemoryConfig) -> Result<Contents, MemoryError> {
    let failed = |source| MemoryError::Map { mib: config.size.bytes() >> 20, source };
    let mut over = chain.pieces();
    over.retain(|(_, layer)| *layer > 0);
    let filled = over.iter().map(|(range, _)| range.clone()).collect();
    over.sort_unstable_by_key(|(range, _)| std::cmp::Reverse(range.end - range.start));
    let copied = over.split_off(over.len().min(MAPPINGS));
    let overlay = |(range, layer): Piece| Ok((range, &chain.layer(layer)?.file));
    let overlays = over.into_iter().map(overlay).collect::<io::Result<Vec<_>>>();
    let overlays = overlays.map_err(failed)?;
    let base = chain.layer(0).map_err(failed)?;
    let memory = ram::map(config, &base.file, &overlays)?;
    let mut buffer = vec![0; BLOCK as usize];
    for (range, layer) in copied {
        let file = &chain.layer(layer).map_err(failed)?.file;
        for at in range.clone().step_by(buffer.len()) {
            let length = usize::try_from(range.end - at).unwrap_or(usize::MAX);
            let length = length.min(buffer.len());
            let (part, _) = buffer.split_at_mut(length);
            file.read_exact_at(part, at)
                .and_then(|()| ram::write(&memory, at, part))
                .map_err(failed)?;
        }
    }
    Ok(Contents { memory, filled, origin: Origin::Mapped })
}
