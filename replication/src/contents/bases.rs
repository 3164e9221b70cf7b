//! What a connection has sent last for each page, as far as it fits.
use super::{PAGE, Page};

/// Pages that compete for the same places.
const WAYS: usize = 4;
/// A place that has no page: no address of a page is odd.
const NOTHING: Tag = Tag { address: 1, serial: 0 };

#[derive(Clone, Copy)]
struct Tag {
    address: u64,
    /// Of the round in which these contents were sent.
    serial: u32,
}

/// The earlier contents of a page that is to be sent.
pub struct Base {
    /// The round in which they were sent.
    pub serial: u32,
    /// How many of the 512 words differ.
    pub differing: u32,
}

/// Contents sent earlier, in sets of four places.
pub struct Bases {
    tags: Vec<[Tag; WAYS]>,
    /// In the same order. Zeroed memory, which the host provides only once it is used.
    pages: Vec<u8>,
}

impl Bases {
    /// At most `bytes` of pages.
    pub fn new(bytes: usize) -> Self {
        let sets = bytes / PAGE / WAYS;
        Self { tags: vec![[NOTHING; WAYS]; sets], pages: vec![0; sets * WAYS * PAGE] }
    }

    /// Forget all.
    pub fn clear(&mut self) {
        self.tags.fill([NOTHING; WAYS]);
    }

    /// Remember `page`, sent in round `serial`, in place of what was sent earlier; if that is known,
    /// its difference to `page` is written to `difference`.
    pub fn replace(
        &mut self,
        address: u64,
        page: &Page,
        serial: u32,
        difference: &mut Page,
    ) -> Option<Base> {
        let (set, way) = self.find(address)?;
        let tag = self.tags.get_mut(set)?.get_mut(way)?;
        let kept = self.pages.as_chunks_mut::<PAGE>().0.get_mut(set * WAYS + way)?;
        if tag.address != address {
            *tag = Tag { address, serial };
            *kept = *page;
            return None;
        }
        let base = Base { serial: tag.serial, differing: exchange(kept, page, difference) };
        if base.differing > 0 {
            tag.serial = serial;
        }
        Some(base)
    }

    /// Whether there is no place for anything.
    pub fn is_empty(&self) -> bool {
        self.tags.is_empty()
    }

    /// The page has other contents now, which are not worth a place.
    pub fn remove(&mut self, address: u64) {
        if let Some((set, way)) = self.find(address)
            && let Some(tag) = self.tags.get_mut(set).and_then(|set| set.get_mut(way))
            && tag.address == address
        {
            *tag = NOTHING;
        }
    }

    /// Where `address` is, else the place in its set that was used longest ago.
    fn find(&self, address: u64) -> Option<(usize, usize)> {
        let number = usize::try_from(address / PAGE as u64).ok()?;
        let set = number.checked_rem(self.tags.len())?;
        let tags = self.tags.get(set)?;
        let way = tags.iter().position(|tag| tag.address == address).or_else(|| {
            let oldest = tags.iter().enumerate().min_by_key(|(_, tag)| tag.serial);
            oldest.map(|(way, _)| way)
        });
        Some((set, way?))
    }
}

/// Put `new` in place of `old`, and their difference into `difference`; the number of words that
/// differ.
fn exchange(old: &mut Page, new: &Page, difference: &mut Page) -> u32 {
    let words = new.as_chunks::<8>().0.iter();
    let words = words.zip(old.as_chunks_mut::<8>().0).zip(difference.as_chunks_mut::<8>().0);
    words.fold(0, |differing, ((new, old), difference)| {
        let word = u64::from_ne_bytes(*new) ^ u64::from_ne_bytes(*old);
        *difference = word.to_ne_bytes();
        *old = *new;
        differing + u32::from(word != 0)
    })
}
