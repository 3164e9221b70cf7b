use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::{
    describe::{Describer, event_names},
    *,
};
use crate::decode::decode;

struct All(Describer);

impl EachCommand for All {
    fn command<C: Command>(&mut self) {
        self.0.command::<C>();
    }
}

/// The schema, by name.
struct Schema(BTreeMap<String, SchemaInfo>);

impl Schema {
    fn new() -> Self {
        let entries = All(Describer::with_events()).all().0.finish();
        let count = entries.len();
        let by_name: BTreeMap<_, _> = entries.into_iter().map(|e| (e.name.clone(), e)).collect();
        assert_eq!(by_name.len(), count, "a name is there twice");
        Self(by_name)
    }

    fn members(&self, object: &str) -> &[SchemaMember] {
        let entry = &self.0[object];
        assert_eq!(entry.meta_type, SchemaMetaType::Object);
        entry.members.as_deref().unwrap()
    }

    /// A value of type `name`; objects with all members, or only with the mandatory ones.
    fn sample(&self, name: &str, optional: bool) -> Value {
        let entry = &self.0[name];
        match entry.meta_type {
            SchemaMetaType::Builtin => match name {
                "str" => json!("text"),
                "int" => json!(7),
                "bool" => json!(true),
                "any" => json!({"free": [1]}),
                other => panic!("what is {other}?"),
            },
            SchemaMetaType::Enum => json!(entry.values.as_ref().unwrap().last().unwrap()),
            SchemaMetaType::Array => {
                json!([self.sample(entry.element_type.as_ref().unwrap(), optional)])
            }
            SchemaMetaType::Object => self
                .members(name)
                .iter()
                .filter(|m| optional || m.default.is_none())
                .map(|m| (m.name.clone(), self.sample(m.r#type.as_ref().unwrap(), optional)))
                .collect::<Map<_, _>>()
                .into(),
            SchemaMetaType::Command | SchemaMetaType::Event => panic!("{name} is no type"),
        }
    }
}

#[test]
fn every_name_that_is_used_is_described() {
    let schema = Schema::new();
    for entry in schema.0.values() {
        let members = entry.members.iter().flatten().filter_map(|m| m.r#type.as_ref());
        let used = [&entry.arg_type, &entry.ret_type, &entry.element_type];
        for name in used.into_iter().flatten().chain(members) {
            assert!(schema.0.contains_key(name), "{name} of {}", entry.name);
        }
    }
}

#[test]
fn names_are_in_order() {
    assert!(NAMES.is_sorted());
}

/// Compares the schema with the reader of the arguments.
struct Arguments(Schema);

impl Arguments {
    fn check<C: Command>(&self, arguments: Value) -> Result<(), String> {
        let Value::Object(arguments) = arguments else { panic!("no object") };
        decode::<C>(arguments).map(drop).map_err(|e| e.to_string())
    }
}

impl EachCommand for Arguments {
    fn command<C: Command>(&mut self) {
        let schema = &self.0;
        let object = schema.0[C::NAME].arg_type.as_deref().unwrap();
        let (full, least) = (schema.sample(object, true), schema.sample(object, false));
        self.check::<C>(full.clone()).unwrap();
        self.check::<C>(least.clone()).unwrap();

        let mut strange = least.clone();
        strange["no-such-key"] = json!(1);
        let wrong = self.check::<C>(strange).unwrap_err();
        let known =
            wrong.split_once("known here: ").map_or("", |(_, list)| list.trim_end_matches(')'));
        let known: BTreeSet<&str> = known.split(", ").filter(|name| !name.is_empty()).collect();
        let described: BTreeSet<&str> =
            schema.members(object).iter().map(|m| m.name.as_str()).collect();
        assert_eq!(known, described, "{}", C::NAME);

        for member in schema.members(object) {
            let name = &member.name;
            let mut without = full.clone();
            without.as_object_mut().unwrap().remove(name);
            let optional = self.check::<C>(without).is_ok();
            assert_eq!(optional, member.default.is_some(), "{} {name}", C::NAME);
            if member.r#type.as_deref() != Some("any") {
                let mut mistyped = full.clone();
                mistyped[name] = json!([[]]);
                let wrong = self.check::<C>(mistyped).unwrap_err();
                assert!(wrong.contains(&format!("'{name}")), "{wrong}");
            }
        }
    }
}

#[test]
fn the_schema_describes_exactly_which_arguments_are_read() {
    Arguments(Schema::new()).all();
}

/// Compares the schema with the writer of the replies.
struct Replies(Schema);

impl EachCommand for Replies {
    fn command<C: Command>(&mut self) {
        let reply = self.0.0[C::NAME].ret_type.as_deref().unwrap();
        for optional in [true, false] {
            let sample = self.0.sample(reply, optional);
            let typed: C::Return = serde_json::from_value(sample.clone())
                .unwrap_or_else(|e| panic!("{}: {e} in {sample}", C::NAME));
            assert_eq!(serde_json::to_value(typed).unwrap(), sample, "{}", C::NAME);
        }
    }
}

#[test]
fn the_schema_describes_exactly_what_is_replied() {
    Replies(Schema::new()).all();
}

#[test]
fn the_schema_describes_exactly_which_events_there_are() {
    let schema = Schema::new();
    let described: BTreeSet<_> = schema
        .0
        .values()
        .filter(|e| e.meta_type == SchemaMetaType::Event)
        .map(|e| e.name.clone())
        .collect();
    assert_eq!(described, event_names().into_iter().map(|n| n.name).collect());
    assert!(described.len() >= 8);
    for name in described {
        for optional in [true, false] {
            let data = schema.sample(schema.0[&name].arg_type.as_deref().unwrap(), optional);
            let message = json!({"event": name, "data": data});
            let typed: Event = serde_json::from_value(message.clone()).unwrap();
            assert_eq!(serde_json::to_value(typed).unwrap(), message);
        }
    }
}

#[test]
fn the_schema_has_qemus_form() {
    let schema = Schema::new();
    let written = |name: &str| serde_json::to_string(&schema.0[name]).unwrap();
    assert_eq!(
        written("query-status"),
        r#"{"name":"query-status","meta-type":"command","arg-type":"QueryStatus","ret-type":"StatusInfo"}"#
    );
    assert_eq!(
        written("StatusInfo"),
        r#"{"name":"StatusInfo","meta-type":"object","members":[{"name":"running","type":"bool"},{"name":"singlestep","type":"bool"},{"name":"status","type":"RunState"}]}"#
    );
    assert_eq!(
        written("BlockResize"),
        r#"{"name":"BlockResize","meta-type":"object","members":[{"name":"device","type":"str","default":null},{"name":"node-name","type":"str","default":null},{"name":"size","type":"int"}]}"#
    );
    assert_eq!(
        written("BlockdevDiscard"),
        r#"{"name":"BlockdevDiscard","meta-type":"enum","members":[{"name":"ignore"},{"name":"unmap"}],"values":["ignore","unmap"]}"#
    );
    assert_eq!(
        written("[CpuInfo]"),
        r#"{"name":"[CpuInfo]","meta-type":"array","element-type":"CpuInfo"}"#
    );
    assert_eq!(written("int"), r#"{"name":"int","meta-type":"builtin","json-type":"int"}"#);
    assert_eq!(
        written("SHUTDOWN"),
        r#"{"name":"SHUTDOWN","meta-type":"event","arg-type":"SHUTDOWN-arg"}"#
    );
}

#[test]
fn replies_look_as_the_clients_expect() {
    fn text(value: &impl serde::Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }
    assert_eq!(
        text(&StatusInfo::new(RunState::Paused)),
        r#"{"running":false,"singlestep":false,"status":"paused"}"#
    );
    let props = CpuInstanceProperties {
        core_id: Some(0),
        socket_id: Some(0),
        thread_id: Some(0),
        ..Default::default()
    };
    assert_eq!(
        text(&CpuInfo {
            cpu: 0,
            arch: CpuInfoArch::X86,
            current: true,
            halted: false,
            props,
            qom_path: "/machine/unattached/device[0]".into(),
            thread_id: 8439,
        }),
        r#"{"CPU":0,"arch":"x86","current":true,"halted":false,"props":{"socket-id":0,"core-id":0,"thread-id":0},"qom_path":"/machine/unattached/device[0]","thread_id":8439}"#
    );
    assert_eq!(
        text(&Event::Shutdown { guest: false, reason: ShutdownCause::HostQmpQuit }),
        r#"{"event":"SHUTDOWN","data":{"guest":false,"reason":"host-qmp-quit"}}"#
    );
    assert_eq!(text(&Event::Stop {}), r#"{"event":"STOP","data":{}}"#);
    assert_eq!(
        text(&Event::DeviceDeleted {
            device: "drive-0".into(),
            path: "/machine/peripheral/drive-0".into()
        }),
        r#"{"event":"DEVICE_DELETED","data":{"device":"drive-0","path":"/machine/peripheral/drive-0"}}"#
    );
    assert_eq!(text(&TargetInfo { arch: SysEmuTarget::X86_64 }), r#"{"arch":"x86_64"}"#);
}
