//! `-h` and `-V`.
use std::fmt::Write;

use super::flags::flags;
use super::kinds::models;
use super::table::{Era, Flag, Group, Shape};

/// `-V`.
pub(crate) fn version() -> String {
    format!("StratoVirt {}", env!("CARGO_PKG_VERSION"))
}

/// `-h`.
pub(crate) fn text() -> String {
    let mut out = format!(
        "{}\nusage: stratovirt -config FILE -api-channel unix:PATH [FLAG ...]\n       stratovirt \
         -kernel FILE -qmp unix:PATH,server,nowait [FLAG ...]\n\nA flag takes all words up to the \
         next one that begins with '-'. [0.x] and [2.x]: only in that StratoVirt.\n",
        version()
    );
    let groups = [
        (Group::Control, "Description and control"),
        (Group::Machine, "Machine"),
        (Group::Boot, "Boot"),
        (Group::Storage, "Disks"),
        (Group::Network, "Network"),
        (Group::Characters, "Serial port and console"),
        (Group::Other, "Devices and helpers"),
        (Group::Process, "Process"),
        (Group::Information, "Information"),
    ];
    for (group, heading) in groups {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "\n{heading}:");
        for flag in flags().filter(|flag| flag.group == group) {
            let _ = writeln!(out, "  {}", usage(flag));
            for line in wrapped(&explanation(flag), 90) {
                let _ = writeln!(out, "        {line}");
            }
            if flag.is("device") {
                for model in models() {
                    let _ = writeln!(out, "          {}{}{}", model.name, model.id, model.form);
                }
            }
        }
    }
    for (group, heading) in [
        (Group::Ignored, "Accepted without effect"),
        (Group::Refused, "Known to StratoVirt, not supported"),
    ] {
        let names: Vec<_> = flags().filter(|flag| flag.group == group).map(names).collect();
        let _ = writeln!(out, "\n{heading}:");
        for line in wrapped(&names.join(" "), 90) {
            let _ = writeln!(out, "  {line}");
        }
    }
    out
}

fn names(flag: &Flag) -> String {
    flag.names.iter().map(|name| format!("-{name}")).collect::<Vec<_>>().join(", ")
}

fn usage(flag: &Flag) -> String {
    let form = match flag.shape {
        Shape::Switch | Shape::Any => String::new(),
        Shape::Plain(form) | Shape::Words(form) | Shape::Properties(form, _) => format!(" {form}"),
        Shape::Optional(form) | Shape::OptionalProperties(form) => format!(" [{form}]"),
    };
    format!("{}{form}", names(flag))
}

fn explanation(flag: &Flag) -> String {
    let mut text = flag.help.to_owned();
    if flag.repeat {
        text += "; repeatable";
    }
    let against: Vec<_> = flag.conflicts.iter().map(|name| format!("-{name}")).collect();
    if !against.is_empty() {
        text += &format!("; not together with {}", against.join(", "));
    }
    match flag.era {
        Era::Both => text,
        Era::Old => text + " [0.x]",
        Era::New => text + " [2.x]",
    }
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = vec![];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
