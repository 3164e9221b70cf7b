//! The users of character back-ends: console, serial port, control sockets.
use std::collections::HashSet;
use std::path::Path;

use crate::CharBackend;
use crate::Part;
use crate::types::Id;

use super::Resolver;
use crate::cli::Control;
use crate::cli::draft::{Draft, Serial};
use crate::cli::problem::Place;

impl Resolver {
    /// The back-end of a chardev, which counts as used from now on.
    pub(crate) fn chardev(&mut self, d: &Draft, place: &Place, id: &Id) -> Option<CharBackend> {
        let Some(chardev) = d.chardevs.iter().find(|chardev| chardev.id == *id) else {
            self.missing(place, "chardev", "chardev", id);
            return None;
        };
        if !self.used.insert(id.clone()) {
            self.problems.add_value(&place.key("chardev"), id, "already in use");
        }
        Some(chardev.backend.clone())
    }

    pub(crate) fn serial(&mut self, d: &Draft) -> Option<CharBackend> {
        match d.serial.as_ref()? {
            Serial::Off => None,
            Serial::Backend(place, backend) => {
                self.places.note(Part::Serial, place.key_of("stdio", ""));
                Some(backend.clone())
            }
            Serial::Chardev(place, id) => {
                let said = d.chardevs.iter().find(|chardev| chardev.id == *id);
                self.places.note(Part::Serial, said.map_or(place, |said| &said.place).clone());
                self.chardev(d, place, id)
            }
        }
    }

    /// All control sockets; no path may occur twice among them and the other sockets.
    pub(crate) fn control(&mut self, d: &Draft) -> Vec<Control> {
        let mut control: Vec<_> = d.control.iter().map(|(_, control)| control.clone()).collect();
        for (place, id) in &d.monitors {
            match self.chardev(d, place, id) {
                Some(CharBackend::Socket { path, replay: 0 }) => {
                    control.push(Control { path, connects: false });
                }
                Some(CharBackend::Socket { .. }) => {
                    self.problems.add_value(
                        &place.key("chardev"),
                        id,
                        "replay is not available for QMP",
                    );
                }
                Some(_) => {
                    let rule = "must be a -chardev socket";
                    self.problems.add_value(&place.key("chardev"), id, rule);
                }
                None => {}
            }
        }
        let mut taken: HashSet<&Path> = HashSet::new();
        let chardevs = d.chardevs.iter().map(|chardev| (&chardev.place, &chardev.backend));
        let serial = d.serial.iter().filter_map(|serial| match serial {
            Serial::Backend(place, backend) => Some((place, backend)),
            _ => None,
        });
        let others = chardevs.chain(serial).filter_map(|(place, backend)| match backend {
            CharBackend::Socket { path, .. } => Some((place, path)),
            _ => None,
        });
        let own = d.control.iter().map(|(place, control)| (place, &control.path));
        for (place, path) in own.chain(others) {
            if !taken.insert(path) {
                let rule = "another socket uses this path";
                self.problems.add_value(place, &path.to_string_lossy(), rule);
            }
        }
        control
    }

    /// Only one device can use the standard streams, and none in a background process.
    pub(crate) fn check_daemon(
        &mut self,
        d: &Draft,
        serial: Option<&CharBackend>,
        console: Option<&CharBackend>,
    ) {
        let on_serial = serial == Some(&CharBackend::Stdio);
        let on_console = console == Some(&CharBackend::Stdio);
        if on_serial && on_console {
            self.problems.add_line("-serial and the console both use stdio: only one can");
        }
        if d.daemonize && on_serial {
            self.problems.add_line(
                "Serial with stdio and daemonize can't be set together: use -serial pty, file or \
                 socket, or leave -daemonize out",
            );
        }
        if d.daemonize && on_console {
            self.problems.add_line(
                "Console with stdio and daemonize can't be set together: use -chardev pty, file or \
                 socket, or leave -daemonize out",
            );
        }
    }
}
