//! The parts of a scenario.
use super::{Metric, Scenario};

/// A part of a scenario. Each part starts its own guests, so that a failure does not affect the
/// others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A guest of a few instructions starts.
    Payload,
    /// A guest is saved while it runs on.
    SaveLive,
    /// A guest is saved.
    Save,
    /// A guest of 256 MiB is restored.
    Restore,
    /// A guest of 4 GiB is restored.
    RestoreLarge,
    /// Many domains are listed.
    List,
    /// Linux boots.
    Init,
    /// Linux boots with disk and NIC, and measures both.
    Devices,
    /// Linux keeps its processors busy, and is stopped.
    Busy,
    /// Linux that writes all over its memory is saved.
    Scattered,
    /// A guest of a few instructions starts, without devices.
    Start,
    /// Linux boots with disk and NIC, and measures small requests and TCP.
    Io,
    /// Many machines start at once.
    Machines,
    /// Many machines are restored at once.
    Clones,
    /// Linux is protected.
    Protection,
}

impl Part {
    /// A label for people.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Payload => "start",
            Self::SaveLive => "save while it runs",
            Self::Save => "save",
            Self::Restore => "restore of 256 MiB",
            Self::RestoreLarge => "restore of 4 GiB",
            Self::List => "list",
            Self::Init => "boot",
            Self::Devices => "boot with disk and NIC",
            Self::Busy => "stop and cont",
            Self::Scattered => "saves",
            Self::Start => "start without devices",
            Self::Io => "4 KiB and TCP",
            Self::Machines => "machines at once",
            Self::Clones => "clones at once",
            Self::Protection => "protection",
        }
    }

    /// The parts of `scenario`.
    #[must_use]
    pub const fn of(scenario: Scenario) -> &'static [Self] {
        match scenario {
            Scenario::Payload => &[Self::Payload],
            Scenario::Snapshots => &[Self::SaveLive, Self::Save, Self::Restore, Self::RestoreLarge],
            Scenario::Domains => &[Self::List],
            Scenario::Linux | Scenario::Emulated => &[Self::Init, Self::Devices, Self::Busy],
            Scenario::Scattered => &[Self::Scattered],
            Scenario::Start => &[Self::Start],
            Scenario::Boot => &[Self::Init],
            Scenario::Io => &[Self::Io],
            Scenario::Density => &[Self::Machines, Self::Clones],
            Scenario::RemusFew
            | Scenario::RemusMany
            | Scenario::RemusAuto
            | Scenario::RemusUnpack
            | Scenario::RemusDatabase
            | Scenario::RemusHosts
            | Scenario::RemusHeld
            | Scenario::RemusLocal => &[Self::Protection],
        }
    }

    /// The part of `scenario` that measures `metric`.
    #[must_use]
    pub fn measuring(scenario: Scenario, metric: Metric) -> Option<Self> {
        use Metric as M;
        let part = match metric {
            M::LivePause => Self::SaveLive,
            M::SaveSynced | M::SaveRatio => Self::Save,
            M::Restore => Self::Restore,
            M::RestoreLarge => Self::RestoreLarge,
            M::List => Self::List,
            _ if Self::of(scenario) == [Self::Protection] => Self::Protection,
            M::Init => Self::Init,
            M::ScatteredDirectory | M::ScatteredStream => Self::Scattered,
            M::ManyWall | M::ManyCpu | M::ManyPrivate | M::ManyPss | M::ManyGuest => Self::Machines,
            M::ClonesWall | M::ClonesCpu | M::ClonesPrivate | M::ClonesPss | M::ClonesGuest => {
                Self::Clones
            }
            M::Stop | M::Cont => Self::Busy,
            M::Status if scenario != Scenario::Payload => Self::Busy,
            M::FirstByte if scenario == Scenario::Start => Self::Start,
            M::Api | M::FirstByte | M::Private | M::Status if scenario == Scenario::Payload => {
                Self::Payload
            }
            _ if scenario == Scenario::Io => Self::Io,
            M::Api | M::FirstByte | M::Private | M::Status | M::InitDevices => Self::Devices,
            M::SeqRead | M::SeqWrite | M::RandRead1 | M::RandWrite1 | M::RandRead32 => {
                Self::Devices
            }
            M::TcpOut | M::TcpIn | M::TcpRoundTrips => Self::Devices,
            M::TcpOutCpu | M::TcpInCpu | M::TcpRoundTripCpu => Self::Devices,
            M::Pause
            | M::PausePark
            | M::PauseHarvest
            | M::PauseCopy
            | M::PauseState
            | M::Period
            | M::DirtyPages
            | M::Encode
            | M::WireShare
            | M::CommitLag
            | M::LoneRequest
            | M::Failover
            | M::FailoverDetect
            | M::FailoverApply
            | M::FailoverRun
            | M::BackupMemory
            | M::Work
            | M::Rate => Self::Protection,
        };
        Self::of(scenario).contains(&part).then_some(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_belongs_to_a_part_of_its_scenario() {
        let label = |scenario, metric| Part::measuring(scenario, metric).map(Part::label);
        assert_eq!(label(Scenario::Payload, Metric::Status), Some("start"));
        assert_eq!(label(Scenario::Linux, Metric::Status), Some("stop and cont"));
        assert_eq!(label(Scenario::Emulated, Metric::Api), Some("boot with disk and NIC"));
        assert_eq!(label(Scenario::Domains, Metric::Api), None);
    }
}
