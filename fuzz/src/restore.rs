//! Any saved machine, restored into its devices with null back-ends: the first half of every
//! restore, and the last step of every save.
use config::Description;
use machine::dry_restore;
use state::State;

use crate::saved;

/// Restored, or refused with a named error; a state that restores once restores again.
pub fn entry(input: &[u8]) {
    let read = || State::read(&saved::bytes(input)[..]).ok();
    let Some(state) = read() else { return };
    let restored = |state: State| {
        let description = Description::try_from(&state.config).map_err(|e| e.to_string())?;
        dry_restore(description, state.sections).map(drop).map_err(|e| e.to_string())
    };
    let first = restored(state);
    assert_eq!(Some(first), read().map(restored));
}
