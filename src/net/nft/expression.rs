//! The steps of rules, as expressions of the kernel.

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, Expressions, Immediate, Lookup, Meta, MetaKey, Operator, Payload,
    Register, Verdict, VerdictAttribute,
};

use super::{
    message::{OBJECT_IS_COUNTER, OBJECT_IS_LIMIT, number, text},
    ruleset::{Direction, Fate, Field, Load, Refusal, Step},
};

/// The register that loads write and the others read.
const REGISTER: Register = Register::Reg1;

/// Returns what one step is in the kernel's language; a translation takes two.
pub(super) fn expressions(step: &Step) -> Vec<Expressions> {
    let one = match step {
        Step::Load(what) => load(*what),
        Step::Mask(mask) => Expressions::Bitwise(vec![
            Bitwise::SourceRegister(REGISTER),
            Bitwise::DestinationRegister(REGISTER),
            Bitwise::Length(u32::try_from(mask.len()).expect("a register has 16 bytes")),
            Bitwise::Mask(DataAttribute::Value(mask.clone())),
            Bitwise::Xor(DataAttribute::Value(vec![0; mask.len()])),
        ]),
        Step::Is(value) => compare(Operator::Equal, value),
        Step::IsNot(value) => compare(Operator::NotEqual, value),
        Step::AtLeast(value) => compare(Operator::GreatherThanEqual, value),
        Step::AtMost(value) => compare(Operator::LessThanEqual, value),
        Step::In(set) => Expressions::Lookup(vec![
            Lookup::Set((*set).to_owned()),
            Lookup::SourceRegister(REGISTER),
        ]),
        Step::Limited(limit) => object(OBJECT_IS_LIMIT, limit),
        Step::Count(counter) => object(OBJECT_IS_COUNTER, counter),
        Step::FlowsOver(count) => {
            const COUNT: u16 = 1;
            const FLAGS: u16 = 2;
            const OVER: u32 = 1;
            other("connlimit", vec![number(COUNT, *count), number(FLAGS, OVER)])
        }
        Step::Verdict(decided) => verdict(Verdict::Other(fate(*decided)), None),
        Step::Goto(chain) => verdict(Verdict::Goto, Some(chain)),
        Step::Refuse(refusal) => refuse(*refusal),
        Step::Source(address) => return translate(TRANSLATE_SOURCE, address.octets()),
        Step::Destination(address) => return translate(TRANSLATE_DESTINATION, address.octets()),
        Step::Masquerade => other("masq", Vec::new()),
    };
    vec![one]
}

fn load(what: Load) -> Expressions {
    const LINK: u32 = 0;
    const NETWORK: u32 = 1;
    const TRANSPORT: u32 = 2;
    match what {
        Load::InName => meta(MetaKey::Iifname),
        Load::OutName => meta(MetaKey::Oifname),
        Load::InGroup => meta(MetaKey::Iifgroup),
        Load::OutGroup => meta(MetaKey::Oifgroup),
        Load::NetworkProtocol => meta(MetaKey::Nfproto),
        Load::TransportProtocol => meta(MetaKey::L4Proto),
        Load::Link(field) => payload(LINK, field),
        Load::Network(field) => payload(NETWORK, field),
        Load::Transport(field) => payload(TRANSPORT, field),
        Load::CtState => connection(0, None),
        Load::CtDirection => connection(1, None),
        Load::CtStatus => connection(2, None),
        Load::CtSource(direction) => connection(19, Some(direction)),
        Load::CtDestination(direction) => connection(20, Some(direction)),
        Load::Turn(turns) => {
            const REGISTER_TO: u16 = 1;
            const MODULUS: u16 = 2;
            const TYPE: u16 = 3;
            const COUNTING: u32 = 0;
            let attributes = vec![
                number(REGISTER_TO, REGISTER.into()),
                number(MODULUS, turns),
                number(TYPE, COUNTING),
            ];
            other("numgen", attributes)
        }
    }
}

fn meta(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![Meta::DestinationRegister(REGISTER), Meta::Key(key)])
}

fn payload(base: u32, field: Field) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(REGISTER),
        Payload::Base(base),
        Payload::Offset(field.offset),
        Payload::Len(field.length),
    ])
}

/// Something about the connection, by the number of `enum nft_ct_keys`.
fn connection(key: u32, direction: Option<Direction>) -> Expressions {
    const REGISTER_TO: u16 = 1;
    const KEY: u16 = 2;
    const DIRECTION: u16 = 3;
    let direction = direction.map(|direction| match direction {
        Direction::Original => 0,
        Direction::Reply => 1,
    });
    let attributes = [number(REGISTER_TO, REGISTER.into()), number(KEY, key)]
        .into_iter()
        .chain(direction.map(|way| DefaultNla::new(DIRECTION, vec![way])));
    other("ct", attributes.collect())
}

fn compare(operator: Operator, value: &[u8]) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(REGISTER),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(value.to_vec())),
    ])
}

/// Refers to a counter or a limit of the table.
fn object(kind: u32, name: &str) -> Expressions {
    const TYPE: u16 = 1;
    const NAME: u16 = 2;
    other("objref", vec![number(TYPE, kind), text(NAME, name)])
}

fn verdict(code: Verdict, chain: Option<&str>) -> Expressions {
    let mut attributes = vec![VerdictAttribute::Code(code)];
    attributes.extend(chain.map(|chain| VerdictAttribute::Chain(chain.to_owned())));
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(attributes)),
    ])
}

pub(super) fn fate(fate: Fate) -> u32 {
    match fate {
        Fate::Drop => 0,
        Fate::Accept => 1,
    }
}

fn refuse(refusal: Refusal) -> Expressions {
    const TYPE: u16 = 1;
    const CODE: u16 = 2;
    const TCP_RESET: u32 = 1;
    const ICMP_OF_THE_FAMILY: u32 = 2;
    const ADMIN_PROHIBITED: u8 = 3;
    let attributes = match refusal {
        Refusal::TcpReset => vec![number(TYPE, TCP_RESET), DefaultNla::new(CODE, vec![0])],
        Refusal::AdminProhibited => {
            vec![number(TYPE, ICMP_OF_THE_FAMILY), DefaultNla::new(CODE, vec![ADMIN_PROHIBITED])]
        }
    };
    other("reject", attributes)
}

const TRANSLATE_SOURCE: u32 = 0;
const TRANSLATE_DESTINATION: u32 = 1;

fn translate(kind: u32, address: [u8; 4]) -> Vec<Expressions> {
    const TYPE: u16 = 1;
    const FAMILY: u16 = 2;
    const ADDRESS: u16 = 3;
    const IPV4: u32 = 2;
    let loaded = Expressions::Immediate(vec![
        Immediate::DestinationRegister(REGISTER),
        Immediate::Data(DataAttribute::Value(address.into())),
    ]);
    let attributes =
        vec![number(TYPE, kind), number(FAMILY, IPV4), number(ADDRESS, REGISTER.into())];
    vec![loaded, other("nat", attributes)]
}

/// An expression that the library has no words for.
fn other(name: &str, attributes: Vec<DefaultNla>) -> Expressions {
    Expressions::Other { expression_type: name.to_owned(), attributes }
}
