//! `Ctrl-a` sequences on standard input.
const CTRL_A: u8 = 1;

/// Removes escape sequences from typed input.
pub(super) struct Escape {
    quit: Box<dyn Fn() + Send>,
    armed: bool,
}

impl Escape {
    pub fn new(quit: Box<dyn Fn() + Send>) -> Self {
        Self { quit, armed: false }
    }

    /// Filter the first `len` bytes of `typed` in place; returns how many are left for the guest. A
    /// sequence may be split over calls.
    pub fn filter(&mut self, typed: &mut [u8], len: usize) -> usize {
        let mut kept = 0;
        for at in 0..len.min(typed.len()) {
            let Some(&byte) = typed.get(at) else { break };
            let through = match (std::mem::take(&mut self.armed), byte) {
                (false, CTRL_A) => {
                    self.armed = true;
                    None
                }
                (false, other) => Some(other),
                (true, b'x' | b'X') => {
                    (self.quit)();
                    None
                }
                (true, b'a' | CTRL_A) => Some(CTRL_A),
                (true, _) => None,
            };
            if let (Some(through), Some(place)) = (through, typed.get_mut(kept)) {
                *place = through;
                kept += 1;
            }
        }
        kept
    }
}
