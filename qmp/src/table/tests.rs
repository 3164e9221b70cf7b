use serde_json::json;

use super::*;
use crate::schema::{BlockResize, Quit, Stop};

/// Counts the calls; refuses them once it is locked.
#[derive(Default)]
struct Counter {
    done: u64,
    locked: bool,
}

impl Host for Counter {
    type When = bool;
    fn admit(&self, name: &str, when_locked: bool) -> Result<(), Error> {
        match self.locked && !when_locked {
            true => Err(Error::text(format!("{name} is not possible now"))),
            false => Ok(()),
        }
    }
}

fn table() -> Table<Counter> {
    Table::new(true)
        .on(false, |host: &mut Counter, resize: BlockResize| {
            host.done += resize.size;
            Ok(Empty {})
        })
        .on(true, |_: &mut Counter, _: Quit| Err(Error::new(ErrorClass::DeviceNotFound, "no")))
}

fn run(host: &mut Counter, execute: &str, arguments: Value) -> Result<Value, String> {
    let Value::Object(arguments) = arguments else { panic!("no object") };
    let request = Request { execute: execute.into(), arguments };
    let result = table().dispatch(host, request, &Ticket::for_test());
    result.unwrap().map_err(|e| format!("{:?}: {e}", e.class()))
}

#[test]
fn a_handler_gets_its_arguments_and_its_answer_is_passed_on() {
    let mut host = Counter::default();
    assert_eq!(run(&mut host, "block_resize", json!({"device": "d", "size": 5.0})), Ok(json!({})));
    assert_eq!(host.done, 5);
    assert_eq!(run(&mut host, "quit", json!({})), Err("DeviceNotFound: no".into()));
}

#[test]
fn nothing_is_done_about_what_is_unknown_refused_or_wrong() {
    let mut host = Counter::default();
    for (name, arguments, error) in [
        ("resize", json!({}), "CommandNotFound: The command resize has not been found"),
        ("Quit", json!({}), "CommandNotFound: The command Quit has not been found"),
        ("block_resize", json!({}), "GenericError: Parameter 'size' is missing"),
        (
            "block_resize",
            json!({"size": "5"}),
            "GenericError: Invalid parameter type for 'size', expected: u64",
        ),
    ] {
        assert_eq!(run(&mut host, name, arguments), Err(error.into()));
    }
    host.locked = true;
    assert_eq!(
        run(&mut host, "block_resize", json!({"size": 1})),
        Err("GenericError: block_resize is not possible now".into())
    );
    assert_eq!(host.done, 0);
    assert_eq!(run(&mut host, "qmp_capabilities", json!({})), Ok(json!({})));
}

#[test]
#[should_panic(expected = "quit has two handlers")]
fn two_handlers_for_one_command_are_a_mistake_of_ours() {
    let _ = table().on(true, |_: &mut Counter, _: Quit| Ok(Empty {}));
}

#[test]
fn the_names_are_those_with_a_handler() {
    let names: Vec<_> = table().names().collect();
    assert_eq!(names.len(), 7);
    assert!(names.is_sorted() && !names.contains(&<Stop as Command>::NAME));
}
