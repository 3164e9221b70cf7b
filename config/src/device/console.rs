//! The console: `-device virtconsole` on `-device virtio-serial-device`, `console` of the file, and
//! the older form of `-chardev`.
use state::config as saved;

use super::{DeviceConfig, Facts};
use crate::{
    CharBackend,
    cli::{
        chars,
        draft::{DeviceKind, Draft, Serial},
        kinds::{FileKey, Kind, Model, Section},
        problem::Place,
        resolve::{Found, Resolver},
    },
    saved::{DescriptionError, checked, restore_char, save_char},
    types::Id,
};

/// virtio-console with one port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Its character device's id, the label in `query-chardev`.
    pub id: Id,
    /// Its character back-end.
    pub backend: CharBackend,
    /// Which I/O thread; `None`: the default one.
    pub iothread: Option<Id>,
}

impl Facts for ConsoleConfig {
    fn slot(&self) -> &'static str {
        "console"
    }

    fn flag(&self) -> &'static str {
        "-chardev"
    }

    fn id(&self) -> &Id {
        &self.id
    }

    fn iothread(&self) -> Option<&Id> {
        self.iothread.as_ref()
    }

    fn chars(&self) -> Option<&CharBackend> {
        Some(&self.backend)
    }

    fn saved(&self) -> saved::Contents {
        let backend = save_char(self.backend.clone());
        saved::Contents::Console(saved::Console { id: self.id.clone().into(), backend })
    }
}

impl ConsoleConfig {
    pub(super) fn restored(
        saved: &saved::Console,
        iothread: Option<&Id>,
    ) -> Result<Self, DescriptionError> {
        let saved::Console { id, backend } = saved.clone();
        let (id, backend) = (checked("console", id)?, restore_char(backend));
        Ok(Self { id, backend, iothread: iothread.cloned() })
    }

    pub(super) fn replace(&mut self, wanted: &Self) {
        self.id.clone_from(&wanted.id);
        self.backend.clone_from(&wanted.backend);
    }
}

/// Its row of the table.
pub(crate) const KIND: Kind = Kind {
    section: ("console", Section::List(chars::json_console)),
    paths: &[FileKey { key: "socket_path", needed: false }],
    flags: &[],
    models: &[
        Model {
            name: "virtio-serial-device",
            id: "[,id=ID]",
            form: "[,iothread=ID]",
            make: |f| {
                // StratoVirt takes any number and makes one port.
                let _ = f.number("max_ports", 1..=31u32);
                DeviceKind::SerialBus { iothread: f.id("iothread") }
            },
        },
        Model {
            name: "virtconsole",
            id: ",id=ID",
            form: ",chardev=ID[,nr=0]",
            make: |f| {
                f.require(&["chardev"]);
                let _ = f.number("nr", 0..=0u32);
                DeviceKind::Console { chardev: f.id("chardev") }
            },
        },
    ],
    resolve: |r, draft, devices| {
        let consoles = resolve(r, draft);
        devices.others.extend(r.only_one(consoles, "there can be one virtio-console"));
    },
};

fn resolve(r: &mut Resolver, d: &Draft) -> Vec<Found> {
    let mut buses = vec![];
    let mut consoles: Vec<(&Place, ConsoleConfig)> = vec![];
    for device in &d.devices {
        match &device.kind {
            DeviceKind::SerialBus { iothread } => {
                r.check_iothread(d, &device.place, iothread.as_ref());
                buses.push((&device.place, iothread.clone()));
            }
            DeviceKind::Console { chardev } => {
                if let Some(chardev) = chardev
                    && let Some(backend) = r.chardev(d, &device.place, chardev)
                {
                    let console = ConsoleConfig { id: chardev.clone(), backend, iothread: None };
                    consoles.push((&device.place, console));
                }
                if !d.devices.iter().any(|x| matches!(x.kind, DeviceKind::SerialBus { .. })) {
                    let rule = "needs a -device virtio-serial-device,id=ID";
                    r.problems.add(&device.place, rule);
                }
            }
            DeviceKind::Refused { backends } => r.used.extend(backends.iter().cloned()),
            _ => {}
        }
    }
    if let (true, [(place, _), ..]) = (consoles.is_empty(), buses.as_slice()) {
        r.warnings.push(format!("{place}: no -device virtconsole, so no console"));
    }
    if let [_, (place, _), ..] = buses.as_slice() {
        r.problems.add(place, "there can be one virtio-serial-device");
    }
    if let ([(_, iothread), ..], [(_, console), ..]) = (&*buses, &mut *consoles) {
        console.iothread.clone_from(iothread);
    }
    // Used by -serial or -mon: not a console of its own.
    let elsewhere: Vec<&Id> = d
        .monitors
        .iter()
        .map(|(_, id)| id)
        .chain(d.serial.iter().filter_map(|serial| match serial {
            Serial::Chardev(_, id) => Some(id),
            _ => None,
        }))
        .collect();
    for chardev in d.chardevs.iter().filter(|c| c.console && !elsewhere.contains(&&c.id)) {
        if r.used.insert(chardev.id.clone()) {
            let (id, backend) = (chardev.id.clone(), chardev.backend.clone());
            consoles.push((&chardev.place, ConsoleConfig { id, backend, iothread: None }));
        }
    }
    let found = |(place, console): (&Place, ConsoleConfig)| {
        let said = d.chardevs.iter().find(|chardev| chardev.id == console.id);
        let said = said.map_or(place, |said| &said.place).key_of("socket_path", "");
        Found { place: place.clone(), said, device: DeviceConfig::Console(console) }
    };
    consoles.into_iter().map(found).collect()
}
