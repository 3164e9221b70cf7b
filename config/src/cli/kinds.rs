//! The table of the kinds of devices: the syntax of each on the command line and in the file.
//! Flags, models of `-device`, sections of the file, the paths in them and the conversion to
//! devices all derive from it.
//!
//! Not in it: the serial port, which every machine has, in no slot and with no `-device`, so that
//! a row would be empty but for its flag; `-chardev`, a back-end that the serial port, the console
//! and `-mon` share; and `-object`, which makes I/O threads and the source behind an rng.
use super::draft::{DeviceKind, Draft};
use super::fields::Fields;
use super::resolve::Resolver;
use super::table::Flag;
use super::{disk, net};
use crate::device::{DeviceConfig, balloon, console, rng};
use crate::{DiskConfig, NicConfig};

/// One row.
pub(crate) struct Kind {
    /// Its section of the file.
    pub(crate) section: (&'static str, Section),
    /// Keys of the section that name files of the host.
    pub(crate) paths: &'static [FileKey],
    /// Flags of its own.
    pub(crate) flags: &'static [Flag],
    /// Its models of `-device`.
    pub(crate) models: &'static [Model],
    /// Converts the draft to devices; called in the order of the rows, which is that of their
    /// slots.
    pub(crate) resolve: fn(&mut Resolver, &Draft, &mut Devices),
}

/// All kinds.
pub(crate) static KINDS: [Kind; 5] =
    [disk::KIND, net::KIND, console::KIND, rng::KIND, balloon::KIND];

/// The form of a section of the file, and its reader.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Section {
    Object(fn(&mut Draft, &mut Fields)),
    List(fn(&mut Draft, &mut Fields)),
    Refused(&'static str),
}

/// A key that names a host file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileKey {
    /// The key.
    pub key: &'static str,
    /// The file must exist before the start.
    pub needed: bool,
}

/// A supported model of `-device`.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) name: &'static str,
    /// Its keys, for the help text.
    pub(crate) form: &'static str,
    /// Its id, for the help text: in brackets where one is generated, since nothing ever names it.
    pub(crate) id: &'static str,
    pub(crate) make: fn(&mut Fields) -> DeviceKind,
}

/// The devices of a machine.
#[derive(Default)]
pub(crate) struct Devices {
    pub(crate) disks: Vec<DiskConfig>,
    pub(crate) nics: Vec<NicConfig>,
    pub(crate) others: Vec<DeviceConfig>,
}

/// All models.
pub(super) fn models() -> impl Iterator<Item = &'static Model> {
    KINDS.iter().flat_map(|kind| kind.models)
}

/// Host files that a configuration file names: section, and key in it.
pub fn files() -> impl Iterator<Item = (&'static str, FileKey)> {
    let boot = [("kernel_image_path", true), ("initrd_fs_path", true)];
    let boot = boot.map(|(key, needed)| ("boot-source", FileKey { key, needed }));
    let memory = ("machine-config", FileKey { key: "mem_path", needed: false });
    let kinds = KINDS.iter().flat_map(|kind| kind.paths.iter().map(|key| (kind.section.0, *key)));
    boot.into_iter().chain([memory]).chain(kinds)
}
