//! What the monitor supports, with a machine or without: for programs that query it before they
//! start one.
use config::{
    cli::{Described, Kind, models, object_kinds, options},
    types::CpuCount,
};
use qmp::{Error, ErrorClass, schema::*};

use crate::arch;

pub fn qom_list_types<H>(_: &mut H, command: QomListTypes) -> Result<Vec<ObjectTypeInfo>, Error> {
    let machines = machines().into_iter().map(|machine| format!("{}-machine", machine.name));
    let devices = models().into_iter().map(|model| model.name.to_owned());
    let objects = object_kinds().into_iter().map(str::to_owned);
    let under =
        |parent: &'static str| move |name| ObjectTypeInfo { name, parent: Some(parent.to_owned()) };
    let mut all: Vec<_> = devices
        .map(under("device"))
        .chain(objects.map(under("user-creatable")))
        .chain(machines.map(under("machine")))
        .chain([arch::CPU_MODEL.to_owned()].map(under("cpu")))
        .chain(["kvm-accel".to_owned()].map(under("accel")))
        .collect();
    if let Some(parent) = command.implements {
        all.retain(|found| found.parent.as_ref() == Some(&parent) || found.name == parent);
    }
    Ok(all)
}

pub fn device_list_properties<H>(
    _: &mut H,
    command: DeviceListProperties,
) -> Result<Vec<ObjectPropertyInfo>, Error> {
    let name = command.typename;
    let model = models().into_iter().find(|model| model.name == name);
    let model = model.ok_or_else(|| {
        Error::new(ErrorClass::DeviceNotFound, format!("Device '{name}' not found"))
    })?;
    let property = |(name, kind): (&str, Kind)| ObjectPropertyInfo {
        name: name.into(),
        r#type: match kind {
            Kind::Text => "str",
            Kind::Number => "uint64",
            Kind::Size => "size",
            Kind::Bool => "bool",
        }
        .into(),
    };
    Ok(model.keys.into_iter().map(property).collect())
}

pub fn query_command_line_options<H>(
    _: &mut H,
    command: QueryCommandLineOptions,
) -> Result<Vec<CommandLineOptionInfo>, Error> {
    let parameter = |(name, kind): (&str, Kind)| CommandLineParameterInfo {
        name: name.into(),
        r#type: match kind {
            Kind::Text => CommandLineParameterType::String,
            Kind::Number => CommandLineParameterType::Number,
            Kind::Size => CommandLineParameterType::Size,
            Kind::Bool => CommandLineParameterType::Boolean,
        },
    };
    let info = |option: Described| CommandLineOptionInfo {
        option: option.name.into(),
        parameters: option.keys.into_iter().map(parameter).collect(),
    };
    let all = options().into_iter();
    let Some(name) = command.option else { return Ok(all.map(info).collect()) };
    let found: Vec<_> = all.filter(|option| option.name == name).map(info).collect();
    match found.is_empty() {
        true => Err(Error::text(format!("invalid option name: {name}"))),
        false => Ok(found),
    }
}

pub fn query_migrate_capabilities<H>(
    _: &mut H,
    _: QueryMigrateCapabilities,
) -> Result<Vec<MigrationCapabilityStatus>, Error> {
    Ok(vec![return_path(true)])
}

/// The capability of saves into streams.
pub fn return_path(state: bool) -> MigrationCapabilityStatus {
    MigrationCapabilityStatus { capability: "return-path".into(), state }
}

pub fn query_cpu_definitions<H>(
    _: &mut H,
    _: QueryCpuDefinitions,
) -> Result<Vec<CpuDefinitionInfo>, Error> {
    Ok(vec![CpuDefinitionInfo {
        name: "host".into(),
        typename: arch::CPU_MODEL.into(),
        r#static: false,
        migration_safe: false,
        unavailable_features: Vec::new(),
        deprecated: false,
    }])
}

pub fn query_accelerators<H>(_: &mut H, _: QueryAccelerators) -> Result<AcceleratorInfo, Error> {
    Ok(AcceleratorInfo { enabled: Accelerator::Kvm, present: vec![Accelerator::Kvm] })
}

pub fn query_machines<H>(_: &mut H, _: QueryMachines) -> Result<Vec<MachineInfo>, Error> {
    Ok(machines())
}

fn machines() -> Vec<MachineInfo> {
    let none = MachineInfo {
        name: "none".into(),
        is_default: None,
        cpu_max: 1,
        hotpluggable_cpus: false,
        numa_mem_supported: false,
        deprecated: false,
        acpi: false,
    };
    let microvm = MachineInfo {
        name: "microvm".into(),
        is_default: Some(true),
        cpu_max: u32::from(CpuCount::MAX.get()),
        acpi: true,
        ..none.clone()
    };
    vec![microvm, none]
}

pub fn query_target<H>(_: &mut H, _: QueryTarget) -> Result<TargetInfo, Error> {
    Ok(TargetInfo { arch: arch::TARGET })
}
