//! What character devices lead to: console, serial port, control sockets.
use std::collections::HashSet;
use std::path::Path;

use crate::Part;
use crate::{CharBackend, ConsoleConfig};

use super::Resolver;
use crate::cli::Control;
use crate::cli::draft::{DeviceKind, Draft, Serial};
use crate::cli::problem::Place;

impl Resolver {
    /// Where a chardev leads; it is spoken for from now on.
    pub(super) fn chardev(&mut self, d: &Draft, place: &Place, id: &str) -> Option<CharBackend> {
        let Some(chardev) = d.chardevs.iter().find(|chardev| chardev.id == id) else {
            self.missing(place, "chardev", "chardev", id);
            return None;
        };
        if !self.used.insert(id.to_owned()) {
            self.problems.add_value(&place.key("chardev"), id, "in use by something else");
        }
        Some(chardev.backend.clone())
    }

    pub(super) fn console(&mut self, d: &Draft) -> Option<ConsoleConfig> {
        let mut buses = vec![];
        let mut consoles: Vec<(&Place, ConsoleConfig)> = vec![];
        for device in &d.devices {
            match &device.kind {
                DeviceKind::SerialBus { iothread } => {
                    self.check_iothread(d, &device.place, iothread.as_deref());
                    buses.push((&device.place, iothread.clone()));
                }
                DeviceKind::Console { chardev } => {
                    if let Some(backend) = self.chardev(d, &device.place, chardev) {
                        let console =
                            ConsoleConfig { id: chardev.clone(), backend, iothread: None };
                        consoles.push((&device.place, console));
                    }
                    if !d.devices.iter().any(|x| matches!(x.kind, DeviceKind::SerialBus { .. })) {
                        let rule = "needs a -device virtio-serial-device,id=ID";
                        self.problems.add(&device.place, rule);
                    }
                }
                DeviceKind::Refused { backends } => self.used.extend(backends.iter().cloned()),
                _ => {}
            }
        }
        if let (true, [(place, _), ..]) = (consoles.is_empty(), buses.as_slice()) {
            self.warnings.push(format!("{place}: no -device virtconsole, so no console"));
        }
        if let [_, (place, _), ..] = buses.as_slice() {
            self.problems.add(place, "there can be one virtio-serial-device");
        }
        if let ([(_, iothread), ..], [(_, console), ..]) = (&*buses, &mut *consoles) {
            console.iothread.clone_from(iothread);
        }
        // Spoken for by -serial or -mon: not a console by itself.
        let elsewhere: Vec<&String> = d
            .monitors
            .iter()
            .map(|(_, id)| id)
            .chain(d.serial.iter().filter_map(|serial| match serial {
                Serial::Chardev(_, id) => Some(id),
                _ => None,
            }))
            .collect();
        for chardev in d.chardevs.iter().filter(|c| c.console && !elsewhere.contains(&&c.id)) {
            if self.used.insert(chardev.id.clone()) {
                let (id, backend) = (chardev.id.clone(), chardev.backend.clone());
                consoles.push((&chardev.place, ConsoleConfig { id, backend, iothread: None }));
            }
        }
        if let [_, (place, _), ..] = consoles.as_slice() {
            self.problems.add(place, "there can be one virtio-console");
        }
        let (_, console) = consoles.into_iter().next()?;
        if let Some(said) = d.chardevs.iter().find(|chardev| chardev.id == console.id) {
            self.places.note(Part::Console, said.place.key_of("socket_path", ""));
        }
        Some(console)
    }

    pub(super) fn serial(&mut self, d: &Draft) -> Option<CharBackend> {
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

    /// All control sockets, and no path twice among them and the other sockets.
    pub(super) fn control(&mut self, d: &Draft) -> Vec<Control> {
        let mut control: Vec<_> = d.control.iter().map(|(_, control)| control.clone()).collect();
        for (place, id) in &d.monitors {
            match self.chardev(d, place, id) {
                Some(CharBackend::Socket { path, replay: 0 }) => {
                    control.push(Control { path, connects: false });
                }
                Some(CharBackend::Socket { .. }) => {
                    self.problems.add_value(&place.key("chardev"), id, "QMP has no replay");
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
                let rule = "another socket has this path";
                self.problems.add_value(place, &path.to_string_lossy(), rule);
            }
        }
        control
    }

    /// One thing can have the standard streams, and nothing of a process in the background.
    pub(super) fn check_daemon(
        &mut self,
        d: &Draft,
        serial: Option<&CharBackend>,
        console: Option<&ConsoleConfig>,
    ) {
        let on_serial = serial == Some(&CharBackend::Stdio);
        let on_console = console.is_some_and(|console| console.backend == CharBackend::Stdio);
        if on_serial && on_console {
            self.problems.add_line("-serial and the console both want stdio: one can have it");
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
