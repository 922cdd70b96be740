<?php

// Rows of SQLite, in the tables of the protocol with and without the columns beyond.

declare(strict_types=1);

use Durable\Worker\Answer;
use Durable\Worker\ConnectionLost;
use Durable\Worker\DbTransport;
use Durable\Worker\Messages;

const TASKS = 'CREATE TABLE "p_transport_tasks" (
  step_id text PRIMARY KEY, run_id text NOT NULL, seq integer NOT NULL, name text NOT NULL, grp text NOT NULL, input text,
  attempt integer NOT NULL, status text, claimed_by text, claimed_at bigint, created_at bigint NOT NULL%s)';
const RESULTS = 'CREATE TABLE "p_transport_results" (
  step_id text PRIMARY KEY, run_id text NOT NULL, seq integer NOT NULL, status text NOT NULL, output text, error text,
  started_at bigint, claimed_by text, claimed_at bigint, created_at bigint NOT NULL%s)';

function database(bool $more): PDO
{
    $pdo = new PDO('sqlite::memory:');
    $pdo->exec(sprintf(TASKS, $more ? ', priority integer, token text, extra text, kind text, cancelled_at bigint, deliveries integer,
        refused text' : ''));
    $pdo->exec(sprintf(RESULTS, $more ? ', attempt integer, token text, extra text, kind text, refused text' : ''));

    return $pdo;
}

/** @param array<string, mixed> $more */
function row(PDO $pdo, int $seq, array $more = []): void
{
    $row = $more + ['step_id' => "r:$seq", 'run_id' => 'r', 'seq' => $seq, 'name' => 'a', 'grp' => 'a', 'input' => '{}',
        'attempt' => 1, 'created_at' => $seq];
    $names = implode(', ', array_keys($row));
    $pdo->prepare("INSERT INTO p_transport_tasks ($names) VALUES (" . implode(', ', array_fill(0, count($row), '?')) . ')')
        ->execute(array_values($row));
}

function transport(PDO $pdo): DbTransport
{
    $transport = new DbTransport($pdo, 'p', poll: 0.001);
    $transport->open(['a', 'b'], static function (): void {});

    return $transport;
}

/** @return list<array<string, mixed>> */
function rows(PDO $pdo, string $table): array
{
    return $pdo->query("SELECT * FROM p_transport_$table ORDER BY step_id")->fetchAll(PDO::FETCH_ASSOC);
}

$never = static fn (): bool => false;

foreach ([false, true] as $more) {
    $with = $more ? 'with' : 'without';
    test("a row is claimed once, answered, and gone, $with the columns beyond", static function () use ($more, $never): void {
        $pdo = database($more);
        row($pdo, 1);
        row($pdo, 0);
        row($pdo, 2, ['grp' => 'c']);
        $one = transport($pdo)->take($never);
        $two = transport($pdo)->take($never);
        same(null, transport($pdo)->take($never));
        [, $task] = Messages::readTask($one->read());
        same(['r:0', '{}'], [$task->stepId, json_encode($task->input)]);
        same(true, $one->keep());
        $one->answer(Answer::completed($task, ['n' => 1.0], 5, []));
        same(false, $one->keep());
        $result = rows($pdo, 'results')[0];
        same(['completed', '{"n":1.0}', 5, null], [$result['status'], $result['output'], $result['started_at'], $result['error']]);
        $two->giveBack();
        same(['r:1', 'r:2'], array_column(rows($pdo, 'tasks'), 'step_id'));
        same([null, null], array_column(rows($pdo, 'tasks'), 'claimed_by'));
        same(true, transport($pdo)->take($never) !== null);
    });
}

test('what a lease has run out for is another worker\'s', static function () use ($never): void {
    $pdo = database(true);
    row($pdo, 0);
    $one = transport($pdo)->take($never);
    $pdo->exec('UPDATE p_transport_tasks SET claimed_at = claimed_at - 31000');
    $two = transport($pdo)->take($never);
    same([false, true], [$one->keep(), $two->keep()]);
    $one->giveBack();
    $one->drop();
    same(true, $two->keep());
});

test('what is more urgent comes first', static function () use ($never): void {
    $pdo = database(true);
    row($pdo, 0);
    row($pdo, 1, ['priority' => 5]);
    same('r:1', transport($pdo)->take($never)->read()->stepId);
});

test('a result of a later attempt takes the place of an older one', static function () use ($never): void {
    $pdo = database(true);
    foreach ([2 => 2, 1 => 2] as $attempt => $stays) {
        row($pdo, 0, ['attempt' => $attempt]);
        $delivery = transport($pdo)->take($never);
        $delivery->answer(Answer::completed($delivery->read(), $attempt, 0, []));
        same($stays, rows($pdo, 'results')[0]['attempt']);
    }
});

test('tokens, traces, lines and turns stand in columns of their own', static function () use ($never): void {
    $pdo = database(true);
    row($pdo, 0, ['token' => 'secret', 'extra' => '{"traceparent":"00-x","context":{}}']);
    $delivery = transport($pdo)->take($never);
    $task = Messages::readTask($delivery->read())[1];
    same(['secret', '00-x'], [$task->token, $task->traceparent]);
    $delivery->answer(Answer::failed($task, ['message' => 'no'], 1, [['at' => 1, 'level' => 'info', 'message' => 'm']]));
    $result = rows($pdo, 'results')[0];
    same(['secret', 1, '{"message":"no"}', null], [$result['token'], $result['attempt'], $result['error'], $result['output']]);
    same('{"events":[{"at":1,"level":"info","message":"m"}]}', $result['extra']);
    row($pdo, 0, ['step_id' => 'r:wf:1', 'kind' => 'turn', 'extra' => '{"workflow":"w"}']);
    same('{"workflow":"w"}', json_encode(transport($pdo)->take($never)->read()));
});

test('a cancelled row is not served, and a row that kills workers is answered', static function () use ($never): void {
    $pdo = database(true);
    row($pdo, 0, ['cancelled_at' => 1]);
    same([null, []], [transport($pdo)->take($never), rows($pdo, 'tasks')]);
    row($pdo, 1, ['deliveries' => 3]);
    same([null, []], [transport($pdo)->take($never), rows($pdo, 'tasks')]);
    same(true, str_contains(rows($pdo, 'results')[0]['error'], 'worker_failed'));
    row($pdo, 2);
    $delivery = transport($pdo)->take($never);
    $pdo->exec('UPDATE p_transport_tasks SET cancelled_at = 1');
    same(false, $delivery->keep());
});

test('an unreadable row is answered', static function () use ($never): void {
    $pdo = database(true);
    row($pdo, 0, ['input' => '{nope']);
    $delivery = transport($pdo)->take($never);
    $delivery->refuse('it is not JSON');
    same(true, str_contains(rows($pdo, 'results')[0]['error'], 'payload_type'));
});

test('tables that are not there are said in words', static function () use ($never): void {
    $error = throws(RuntimeException::class, static fn () => transport(new PDO('sqlite::memory:'))->take($never));
    same(true, str_contains($error->getMessage(), 'p_transport_tasks'));
    same(false, $error instanceof ConnectionLost);
});
