#[hopline::service]
trait Demo {
    #[rpc(name = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx")]
    async fn put(&self);
}

fn main() {}
