//! The accepted flags and keys, for programs that query them first. There is no separate list: each
//! reader of flags and devices runs on empty input and records the keys that it asks for.
use super::draft::Draft;
use super::fields::{Fields, Kind, Raw};
use super::flags::flags;
use super::kinds;
use super::problem::Place;
use super::table::{Effect, Flag, Shape};
use super::{chars, device, objects};

/// A flag or a model of `-device`, and its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// Its name, without a dash.
    pub name: &'static str,
    /// Its keys, and the type of each.
    pub keys: Vec<(&'static str, Kind)>,
}

/// All flags that have an effect.
pub fn options() -> Vec<Described> {
    flags().filter_map(option).collect()
}

/// All models of `-device`.
pub fn models() -> Vec<Described> {
    let model = |name| {
        let keys = keys(device::device, Some(("driver", name)));
        Described { name, keys: keys.into_iter().filter(|(key, _)| *key != "driver").collect() }
    };
    kinds::models().map(|model| model.name).map(model).collect()
}

/// All kinds of `-object`.
pub fn object_kinds() -> Vec<&'static str> {
    names(objects::KINDS)
}

fn option(flag: &Flag) -> Option<Described> {
    let name = *flag.names.first()?;
    let apply = match flag.effect {
        Effect::Apply(apply) => apply,
        Effect::Action => return Some(Described { name, keys: vec![] }),
        Effect::Ignore | Effect::Refuse(_) => return None,
    };
    let lead = match flag.shape {
        Shape::Properties(_, lead) => lead,
        Shape::OptionalProperties(_) => None,
        _ => return Some(Described { name, keys: vec![] }),
    };
    // The keys may depend on the first word.
    let words = match name {
        "device" => kinds::models().map(|model| model.name).collect(),
        "chardev" | "serial" => names(chars::KINDS),
        "object" => names(objects::KINDS),
        "netdev" => vec!["tap"],
        _ => vec![],
    };
    let mut all = keys(apply, None);
    for word in words {
        for key in keys(apply, lead.map(|lead| (lead, word))) {
            if !all.contains(&key) {
                all.push(key);
            }
        }
    }
    Some(Described { name, keys: all })
}

fn names<T>(choices: &'static [(&'static str, Result<T, &'static str>)]) -> Vec<&'static str> {
    choices.iter().filter(|(_, choice)| choice.is_ok()).map(|(name, _)| *name).collect()
}

/// The keys that a reader asks for when it is given one value, or none.
fn keys(
    apply: fn(&mut Draft, &mut Fields),
    given: Option<(&str, &str)>,
) -> Vec<(&'static str, Kind)> {
    let items = given.map(|(key, word)| (key.to_owned(), Raw::Text(word.to_owned())));
    let mut fields = Fields::new(Place::Flag(String::new()), items.into_iter().collect());
    apply(&mut Draft::default(), &mut fields);
    fields.known().filter(|(key, _)| !key.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys_of(name: &str, all: &[Described]) -> Vec<(&'static str, Kind)> {
        all.iter().find(|described| described.name == name).unwrap().keys.clone()
    }

    #[test]
    fn keys_are_those_that_are_read() {
        let options = options();
        let machine = keys_of("machine", &options);
        for key in [("type", Kind::Text), ("mem-share", Kind::Bool), ("disk-slots", Kind::Number)] {
            assert!(machine.contains(&key), "{machine:?}");
        }
        assert!(keys_of("m", &options).contains(&("size", Kind::Size)));
        for key in ["id", "filename", "qom-type"] {
            assert!(keys_of("object", &options).iter().any(|(known, _)| *known == key), "{key}");
        }
        for key in ["drive", "netdev", "chardev", "rng"] {
            assert!(keys_of("device", &options).iter().any(|(known, _)| *known == key), "{key}");
        }
        assert_eq!(keys_of("kernel", &options), []);
        assert!(options.iter().all(|option| !["vnc", "rtc"].contains(&option.name)));
    }

    #[test]
    fn a_model_has_its_own_keys() {
        let blk = keys_of("virtio-blk-device", &models());
        assert!(
            blk.contains(&("drive", Kind::Text)) && blk.contains(&("num-queues", Kind::Number))
        );
        assert!(!blk.iter().any(|(key, _)| ["netdev", "driver"].contains(key)), "{blk:?}");
        assert_eq!(object_kinds(), ["iothread", "rng-random"]);
    }
}
