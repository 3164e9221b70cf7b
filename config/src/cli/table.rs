//! The types of the table of flags, and the checks that need only the table.
use super::draft::Draft;
use super::fields::Fields;
use super::flags::{TABLE, flags};
use super::tokens::Given;

/// One row.
#[derive(Debug)]
pub(crate) struct Flag {
    /// Names without the dash, the usual one first.
    pub(crate) names: &'static [&'static str],
    pub(crate) shape: Shape,
    /// May be given more than once.
    pub(crate) repeat: bool,
    pub(crate) group: Group,
    pub(crate) era: Era,
    /// At least one of the flags with the same need must be given.
    pub(crate) need: Option<Need>,
    /// Flags that cannot be given together with this one.
    pub(crate) conflicts: &'static [&'static str],
    /// Empty for a refused or ignored flag.
    pub(crate) help: &'static str,
    pub(crate) effect: Effect,
}

/// The form of a flag's value.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Shape {
    /// Nothing.
    Switch,
    /// One value.
    Plain(&'static str),
    /// One value or none.
    Optional(&'static str),
    /// Any number of words, joined by spaces.
    Words(&'static str),
    /// `key=value,...`, and the key that a first word without `=` stands for.
    Properties(&'static str, Option<&'static str>),
    /// `key=value,...` or nothing.
    OptionalProperties(&'static str),
    /// Anything: it is not read.
    Any,
}

/// Headings of the help text, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    Control,
    Machine,
    Boot,
    Storage,
    Network,
    Characters,
    Other,
    Process,
    Information,
    /// Accepted without effect.
    Ignored,
    /// Refused by name.
    Refused,
}

/// The StratoVirt generation that knows the flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Era {
    Both,
    /// 0.x only.
    Old,
    /// 2.x only.
    New,
}

/// A requirement of every run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    ControlSocket,
}

/// The effect of a flag.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Effect {
    /// Its values are added to the draft.
    Apply(fn(&mut Draft, &mut Fields)),
    /// The caller handles it.
    Action,
    /// Nothing.
    Ignore,
    /// It names something that is not supported yet.
    Refuse(&'static str),
}

pub(crate) const fn row(
    names: &'static [&'static str],
    shape: Shape,
    group: Group,
    effect: Effect,
) -> Flag {
    Flag {
        names,
        shape,
        repeat: false,
        group,
        era: Era::Both,
        need: None,
        conflicts: &[],
        help: "",
        effect,
    }
}

pub(crate) const fn flag(
    names: &'static [&'static str],
    shape: Shape,
    group: Group,
    apply: fn(&mut Draft, &mut Fields),
    help: &'static str,
) -> Flag {
    Flag { help, ..row(names, shape, group, Effect::Apply(apply)) }
}

/// A flag that may be repeated and has no effect: other programs give it by habit.
pub(crate) const fn ignored(names: &'static [&'static str], era: Era) -> Flag {
    Flag { repeat: true, era, ..row(names, Shape::Any, Group::Ignored, Effect::Ignore) }
}

pub(crate) const fn refused(names: &'static [&'static str], what: &'static str) -> Flag {
    Flag { repeat: true, ..row(names, Shape::Any, Group::Refused, Effect::Refuse(what)) }
}

impl Flag {
    pub(crate) const fn repeatable(self) -> Self {
        Self { repeat: true, ..self }
    }

    pub(crate) const fn only(self, era: Era) -> Self {
        Self { era, ..self }
    }

    pub(crate) const fn needed(self, need: Need) -> Self {
        Self { need: Some(need), ..self }
    }

    pub(crate) const fn against(self, conflicts: &'static [&'static str]) -> Self {
        Self { conflicts, ..self }
    }

    /// Whether the flag has this name.
    pub(crate) fn is(&self, name: &str) -> bool {
        self.names.contains(&name)
    }
}

/// The row for a name, and the table's own copy of the name.
pub(crate) fn find(name: &str) -> Option<(&'static Flag, &'static str)> {
    flags().find_map(|flag| {
        flag.names.iter().find(|known| **known == name).map(|known| (flag, *known))
    })
}

/// Required flags and conflicts.
pub(crate) fn check(given: &[Given], draft: &mut Draft) {
    let has = |name: &str| given.iter().any(|g| g.flag.is(name));
    for flag in given.iter().map(|g| g.flag) {
        for other in flag.conflicts.iter().filter(|other| has(other)) {
            let name = flag.names.first().copied().unwrap_or_default();
            draft.problems.add_line(format!(
                "The argument '{name}' cannot be used with '{other}': give -{name} or -{other}"
            ));
        }
    }
    if !given.iter().any(|g| g.flag.need == Some(Need::ControlSocket)) {
        let forms: Vec<_> = TABLE
            .iter()
            .filter(|flag| flag.need == Some(Need::ControlSocket))
            .filter_map(|flag| match (flag.names, flag.shape) {
                ([name, ..], Shape::Plain(form) | Shape::Properties(form, _)) => {
                    Some(format!("-{name} {form}"))
                }
                _ => None,
            })
            .collect();
        draft.problems.add_line(format!(
            "Argument 'api-channel' or 'qmp' required, but not found: a control socket is \
             required, one of {}",
            forms.join(" | ")
        ));
    }
}
