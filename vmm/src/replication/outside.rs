//! What of a checkpoint is neither memory nor machine: whether the guest was stopped, and output that
//! the outside may not have seen yet. The backup sends that again when the guest runs there.
//!
//! ```text
//! paused u8  length u32  the events, as JSON  (length u32  output of a character device)..
//! ```
use qmp::schema::Event;

/// The name of its section.
pub const OUTSIDE: &str = "outside";
/// Most events that are kept.
pub const MOST_EVENTS: usize = 1000;
/// Longest output of one character device: as much as its gate holds.
const LONGEST: usize = 256 << 10;
/// Longest of its sections: events are short.
const LONGEST_EVENTS: usize = 1 << 20;
/// Most character devices.
const MOST_DEVICES: usize = 64;

/// What is known of the outside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outside {
    /// A client has stopped the guest.
    pub paused: bool,
    /// Events that the guest has caused, in order.
    pub events: Vec<Event>,
    /// Output of each character device, in the machine's order.
    pub output: Vec<Vec<u8>>,
}

impl Outside {
    /// Its bytes. What was to be sent first is left out where it is too much.
    pub fn encode(&self) -> Vec<u8> {
        let events = serde_json::to_vec(&self.events).unwrap_or_default();
        let mut bytes = vec![u8::from(self.paused)];
        put(&mut bytes, if events.len() <= LONGEST_EVENTS { &events } else { b"[]" });
        for output in self.output.iter().take(MOST_DEVICES) {
            put(&mut bytes, output.get(output.len().saturating_sub(LONGEST)..).unwrap_or_default());
        }
        bytes
    }

    /// Read it; `None` if this is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (paused, mut rest) = bytes.split_first()?;
        let events = take(&mut rest, LONGEST_EVENTS)?;
        let mut output = Vec::new();
        while !rest.is_empty() && output.len() < MOST_DEVICES {
            output.push(take(&mut rest, LONGEST)?.to_vec());
        }
        let events: Vec<Event> = serde_json::from_slice(events).ok()?;
        let valid = *paused <= 1 && rest.is_empty() && events.len() <= MOST_EVENTS;
        valid.then_some(Self { paused: *paused == 1, events, output })
    }
}

fn put(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
    to.extend(bytes);
}

fn take<'a>(from: &mut &'a [u8], longest: usize) -> Option<&'a [u8]> {
    let (length, rest) = from.split_first_chunk()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    let (bytes, rest) = rest.split_at_checked(length).filter(|_| length <= longest)?;
    *from = rest;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use qmp::schema::ShutdownCause;

    use super::*;

    #[test]
    fn what_was_not_seen_outside_arrives_whole_or_not_at_all() {
        let reset = Event::Reset { guest: true, reason: ShutdownCause::GuestReset };
        let outside = Outside {
            paused: true,
            events: vec![reset, Event::Stop {}],
            output: vec![b"login: ".to_vec(), Vec::new()],
        };
        let bytes = outside.encode();
        assert_eq!(Outside::decode(&bytes), Some(outside));
        assert_eq!(Outside::decode(&Outside::default().encode()), Some(Outside::default()));
        for end in 0..bytes.len() {
            let cut = Outside::decode(bytes.get(..end).unwrap());
            assert!(cut.is_none_or(|cut| cut.output.len() < 2), "{end}");
        }
        assert_eq!(Outside::decode(&[2, 2, 0, 0, 0, b'[', b']']), None, "neither yes nor no");
        assert_eq!(Outside::decode(&[0, 1, 0, 0, 0, b'{']), None);
        assert_eq!(Outside::decode(&[0, 255, 255, 255, 255]), None);
    }
}
