//! A raw identifier goes by its bare name on the wire.
#![deny(warnings)]

#[hopline::service]
trait r#Match {
    async fn r#type(&self, r#fn: u8) -> u8;
    #[rpc(name = "new")]
    async fn create(&self, r#struct: String) -> u8;
}

struct Rules;

impl r#Match for Rules {
    async fn r#type(&self, r#fn: u8) -> u8 {
        r#fn
    }
    async fn create(&self, r#struct: String) -> u8 {
        r#struct.len() as u8
    }
}

#[allow(dead_code)]
fn calls(client: &hopline::Client) {
    let client = MatchClient::new(client);
    let _ = (client.r#type(1), client.create(String::new()));
}

fn main() {
    let _ = MatchServer::new(Rules);
}
