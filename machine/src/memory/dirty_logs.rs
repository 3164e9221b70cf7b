//! Dirty page logs of other processes, such as vhost-user back-ends.
use std::{io, sync::Arc};

use devices::{Memory, backend::dirty_log::DirtyLog};
use vm_memory::{
    GuestMemoryBackend, MmapRegion,
    bitmap::{AtomicBitmap, Bitmap},
};

use super::image::PAGE_SIZE;

/// The logs for one machine.
#[derive(Default)]
pub(crate) struct DirtyLogs(Vec<Arc<DirtyLog>>);

impl DirtyLogs {
    /// Add `log`, made for the machine's memory; it counts from now on.
    pub fn add(&mut self, log: Arc<DirtyLog>) {
        self.0.push(log);
    }

    /// Remove `log`. Its pages are marked as written by devices. No process may write to it by now.
    ///
    /// # Errors
    /// When it does not belong to `memory`.
    pub fn remove(&mut self, log: &Arc<DirtyLog>, memory: &Memory) -> io::Result<()> {
        self.0.retain(|other| !Arc::ptr_eq(other, log));
        let words = |pages: u64| usize::try_from(pages.div_ceil(64)).map_err(io::Error::other);
        let empty = |size: u64| Ok(vec![0; words(size / PAGE_SIZE)?]);
        let sizes = memory.iter().map(vm_memory::GuestMemoryRegion::len);
        let mut bitmaps = sizes.map(empty).collect::<io::Result<Vec<Vec<u64>>>>()?;
        log.move_into(memory, &mut bitmaps)?;
        for (region, bitmap) in memory.iter().zip(bitmaps) {
            let mapping: &MmapRegion<AtomicBitmap> = region;
            for (word, mut bits) in bitmap.into_iter().enumerate() {
                while bits != 0 {
                    let page = word * 64 + bits.trailing_zeros() as usize;
                    mapping.bitmap().mark_dirty(page * PAGE_SIZE as usize, 1);
                    bits &= bits - 1;
                }
            }
        }
        Ok(())
    }

    /// Move their contents into `bitmaps`, one per region of `memory`, with a bit per page.
    ///
    /// # Errors
    /// When a log does not belong to `memory`.
    pub fn move_into(&self, memory: &Memory, bitmaps: &mut [Vec<u64>]) -> io::Result<()> {
        self.0.iter().try_for_each(|log| log.move_into(memory, bitmaps))
    }

    /// Discard their contents.
    ///
    /// # Errors
    /// When one cannot be reached.
    pub fn forget(&self) -> io::Result<()> {
        self.0.iter().try_for_each(|log| log.forget())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd, os::unix::fs::FileExt};

    use config::MemoryConfig;

    use super::*;
    use crate::memory::{allocate, image};

    #[test]
    fn pages_of_all_logs_are_among_those_that_were_written_even_when_one_goes() {
        let config =
            MemoryConfig { shared: true, ..MemoryConfig::new((16 << 20).try_into().unwrap()) };
        let memory = allocate(&config).unwrap();
        let page = |n: u64| n * PAGE_SIZE..(n + 1) * PAGE_SIZE;
        let by_vcpus = || vec![vec![1u64 << 63; 64]];
        let log = || Arc::new(DirtyLog::new(&memory).unwrap());
        // Sets a bit as another process does through its own mapping.
        let set = |log: &DirtyLog, page: u64| {
            let file = File::from(log.as_fd().try_clone_to_owned().unwrap());
            file.write_all_at(&[1 << (page % 8)], page / 8).unwrap();
        };
        let (first, second) = (log(), log());
        let mut logs = DirtyLogs::default();
        logs.add(first.clone());
        logs.add(second.clone());
        set(&first, 5);
        set(&second, 80);
        let mut bitmaps = vec![vec![0u64; 64]];
        bitmaps[0][0] = 1;
        logs.move_into(&memory, &mut bitmaps).unwrap();
        let written = image::dirty(&memory, &bitmaps).unwrap();
        assert_eq!(written, [page(0), page(5), page(80)]);
        set(&first, 9);
        set(&second, 17);
        logs.remove(&first, &memory).unwrap();
        set(&first, 33);
        let mut bitmaps = by_vcpus();
        bitmaps[0].iter_mut().skip(1).for_each(|word| *word = 0);
        logs.move_into(&memory, &mut bitmaps).unwrap();
        assert_eq!(image::dirty(&memory, &bitmaps).unwrap(), [page(9), page(17), page(63)]);
        set(&second, 17);
        logs.forget().unwrap();
        let mut bitmaps = vec![vec![0u64; 64]];
        logs.move_into(&memory, &mut bitmaps).unwrap();
        assert_eq!(image::dirty(&memory, &bitmaps).unwrap(), []);
    }
}
