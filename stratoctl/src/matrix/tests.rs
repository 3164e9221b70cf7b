use super::*;

const DOCUMENT: &str = include_str!("../../../docs/stratoctl.md");
const BEGIN: &str = "<!-- the matrix: made from stratoctl/src/matrix.rs -->\n";
const END: &str = "<!-- end of the matrix -->";

/// A verb as it is typed.
fn word(verb: Verb) -> String {
    let mut word = String::new();
    for c in format!("{verb:?}").chars() {
        if c.is_uppercase() && !word.is_empty() {
            word.push('-');
        }
        word.extend(c.to_lowercase());
    }
    word
}

/// The table as the documentation shows it.
fn markdown() -> String {
    let mut text = String::from("| |");
    State::ALL.iter().for_each(|state| text += &format!(" {} |", state.word()));
    text += "\n|---|";
    State::ALL.iter().for_each(|_| text += "---|");
    text.push('\n');
    let mut reasons = Vec::new();
    for (verb, cells) in TABLE {
        text += &format!("| {} |", word(verb));
        for cell in cells {
            let mark = match cell {
                Yes => "yes".to_owned(),
                No(..) | Kept(..) | Unforced(..) => {
                    let known = reasons.iter().position(|known| *known == cell);
                    let at = known.unwrap_or_else(|| {
                        reasons.push(cell);
                        reasons.len() - 1
                    });
                    let sign = match cell {
                        Kept(..) => "*",
                        Unforced(..) => "-F",
                        _ => "",
                    };
                    format!("{}{sign}", at + 1)
                }
            };
            text += &format!(" {mark} |");
        }
        text.push('\n');
    }
    text.push('\n');
    for (at, reason) in reasons.iter().enumerate() {
        if let No(what, hint) | Kept(what, hint) | Unforced(what, hint) = reason {
            let fill = |text: &str| text.replace("{}", "NAME");
            text += &format!("{}. {}: {}\n", at + 1, fill(what), fill(hint));
        }
    }
    text
}

#[test]
fn the_documentation_shows_this_table() {
    let wanted = markdown();
    let shown = DOCUMENT.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END));
    let shown = shown.map(|(table, _)| table);
    assert_eq!(shown, Some(wanted.as_str()), "put this into docs/stratoctl.md:\n{wanted}");
}

#[test]
fn every_verb_has_one_row_and_every_refusal_names_a_way_out() {
    for (verb, cells) in TABLE {
        assert_eq!(TABLE.iter().filter(|(known, _)| *known == verb).count(), 1, "{verb:?}");
        for (state, cell) in State::ALL.into_iter().zip(cells) {
            let name: Name = "web".parse().expect("a name");
            match admit(verb, state, &name, Leave::default()) {
                Ok(()) => assert_eq!(cell, Yes),
                Err(failure) => {
                    let error = anyhow::Error::from(failure);
                    let hint = crate::failure::hint_of(&error).expect("a hint").to_owned();
                    assert!(error.to_string().contains("'web'"), "{verb:?} {state:?}: {error}");
                    assert!(hint.contains('`') && !hint.contains("{}"), "{verb:?}: {hint}");
                }
            }
        }
    }
}

#[test]
fn nothing_but_a_new_domain_begins_where_there_is_none() {
    for (verb, _) in TABLE {
        let new = matches!(verb, Verb::Create | Verb::New | Verb::Restore);
        assert_eq!(cell(verb, State::Absent) == Yes, new, "{verb:?}");
        assert_eq!(cell(verb, State::Running) == TAKEN, new, "{verb:?}");
    }
}

#[test]
fn a_hung_or_killed_monitor_can_always_be_cleared_away() {
    for state in State::ALL {
        let nothing_runs = matches!(state, State::Absent | State::Registered | State::Moved);
        let name: Name = "web".parse().expect("a name");
        let forced = Leave { force: true, renames: false };
        let admitted = admit(Verb::Destroy, state, &name, forced).is_ok();
        assert_eq!(admitted, !nothing_runs, "{state:?}");
    }
}

#[test]
fn what_protects_a_guest_is_not_ended_by_accident() {
    let unforced = |state| matches!(cell(Verb::Destroy, state), Unforced(..));
    let asking: Vec<_> = State::ALL.into_iter().filter(|state| unforced(*state)).collect();
    assert_eq!(asking, [State::Protected, State::Standby]);
}

#[test]
fn a_protection_restricts_what_a_state_allows() {
    let name: Name = "web".parse().expect("a name");
    let leave = Leave::default();
    let admitted = |verb, state, beside| admit_both(verb, (state, beside), &name, leave).is_ok();
    let (protected, degraded) = (Some(State::Protected), Some(State::Degraded));
    for (verb, state, beside, wanted) in [
        (Verb::Pause, State::Running, protected, true),
        (Verb::Save, State::Running, protected, false),
        (Verb::Save, State::Running, None, true),
        (Verb::Reboot, State::Paused, protected, false),
        (Verb::Reboot, State::Running, protected, true),
        (Verb::Failover, State::Running, protected, true),
        (Verb::Failover, State::Paused, protected, true),
        (Verb::Failover, State::Running, degraded, false),
        (Verb::Failover, State::Running, None, false),
        (Verb::Failover, State::Crashed, protected, false),
        (Verb::Remus, State::Running, degraded, true),
        (Verb::Destroy, State::Crashed, protected, false),
        (Verb::Destroy, State::Crashed, degraded, true),
    ] {
        assert_eq!(admitted(verb, state, beside), wanted, "{verb:?} {state:?} {beside:?}");
    }
}
